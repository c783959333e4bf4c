"""The header of a safetensors file, read as if somebody had written it to mislead.

It is JSON: name → dtype, shape, and where the data lie. The data have to cover the rest of the file once, without gaps
and overlaps, and every shape has to need as many bytes as its tensor has.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coprune.base.errors import BadInput

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """What a header says of one tensor: dtype in the format's letters, shape, and its bytes within the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header_bytes(file: Path) -> bytes:
    """The JSON header of a safetensors file as it is there. Raises BadInput if the file is too short for one."""
    try:
        if not file.is_file():  # a pipe would be waited for without end
            raise BadInput(f"{file} is no file", fix="fetch or save it again")
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if 2 <= length <= min(MAX_HEADER_BYTES, file.stat().st_size - 8):
                return stream.read(length)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from error
    raise BadInput(f"{file} is cut off or not a safetensors file", fix="fetch or save it again")


def parse_header(text: bytes) -> dict[str, Stored]:
    """The tensors of a header in the order of their data.

    Raises BadInput, which does not know the file, on anything that is no sound header.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"no JSON, or one name twice: {str(error)[:100]}") from error
    if not isinstance(content, dict):
        raise _malformed("no JSON object")
    found = {name: _stored(name, entry) for name, entry in content.items() if name != "__metadata__"}
    ordered = sorted(found.items(), key=lambda item: (item[1].begin, item[1].end))
    end = 0
    for name, stored in ordered:
        if stored.begin != end:
            raise _malformed(f"the data of {name!r} begin at {stored.begin:,} and not at {end:,}")
        end = stored.end
    return dict(ordered)


def _stored(name: str, entry: Any) -> Stored:
    try:
        name.encode()
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:  # a name can be no text, with half of a surrogate pair in it
        raise _malformed(f"what it says of {name!r}") from error
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(one) is int and one >= 0 for one in numbers) or end < begin:
        raise _malformed(f"what it says of {name!r}")
    known = DTYPES.get(dtype)
    if known is not None and math.prod(shape) * known.itemsize != end - begin:
        raise _malformed(f"{end - begin:,} bytes for {name!r}, of the shape {tuple(shape)}")
    return Stored(dtype, tuple(shape), begin, end)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def _malformed(what: str) -> BadInput:
    return BadInput(f"the header is malformed ({what})", fix="fetch or save it again")
