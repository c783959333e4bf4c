"""The safetensors files of a checkpoint folder: their names, content and integrity.

A safetensors file begins with the length of a JSON header of every tensor's dtype, shape and offset, so a truncated or foreign
file is recognised in microseconds. Tensors are read with plain reads: the library maps the whole file, which an address space
limit may forbid.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coprune.base.errors import BadInput

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_JSON_BYTES = 200_000_000  # tokenizers reach tens of millions


Buffer = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Allocates a tensor of a shape and dtype."""


@dataclass(frozen=True)
class TensorEntry:
    """Location of a tensor: file, the format's dtype name (F32, BF16 …), shape, first byte and size in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The stored tensors: the entry itself, unless it is decoded from several."""
        return (self,)

    def at(self, index: int) -> TensorEntry | None:
        """Return the location of one index of the first axis; None if it cannot be read separately."""
        nbytes = self.nbytes // self.shape[0]
        return TensorEntry(self.file, self.dtype, self.shape[1:], self.start + index * nbytes, nbytes)

    def read(self, buffer: Buffer) -> Tensor:
        """Read the tensor into memory from `buffer`. Raises as `read_tensor`."""
        return _read_stored(self, buffer)


def read_entries(file: Path) -> dict[str, TensorEntry]:
    """Read the header of a safetensors file and check that the file is as long as the header says.

    Raises BadInput, naming the file, if it is cut off or not in the format.
    """
    text = read_header_bytes(file)
    try:
        stored = parse_header(text)
    except BadInput as error:
        raise error.within(f"{file} is cut off or not a safetensors file") from error
    data_at = 8 + len(text)
    end = data_at + max((tensor.end for tensor in stored.values()), default=0)
    size = file.stat().st_size
    if size != end:
        raise BadInput(
            f"{file} has {size:,} bytes, but its header says {end:,}: it is cut off or damaged",
            fix="fetch or save it again",
        )
    return {
        name: TensorEntry(file, tensor.dtype, tensor.shape, data_at + tensor.begin, tensor.end - tensor.begin)
        for name, tensor in stored.items()
    }


def shard_files(folder: Path) -> list[Path]:
    """List the safetensors files that make up the model, in the index's order.

    Raises BadInput if there are none, or if the index is malformed or names a file that is missing.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    # The same precedence as transformers: a single file wins over an index.
    if single.is_file():
        return [single]
    if not index.is_file():
        raise _no_weights(folder)
    names = sorted(set(read_weight_map(index).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInput(
            f"{index} names {len(names)} shards, of which {len(missing)} are missing, first {missing[0]}",
            fix="fetch or save the checkpoint again",
        )
    return [folder / name for name in names]


def read_weight_map(index: Path) -> dict[str, str]:
    """Read an index: tensor name → file name. Raises BadInput if it is malformed."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index} has no weight_map", fix="fetch or save the checkpoint again")
    if other := [str(file) for file in weight_map.values() if not str(file).endswith(".safetensors")]:
        raise BadInput(
            f"{index} names {min(other)}, which is not a safetensors file", fix="fetch or save the checkpoint again"
        )
    return {str(name): str(file) for name, file in weight_map.items()}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises BadInput, naming the file, if it is missing, malformed or too large."""
    try:
        if file.exists() and not file.is_file():
            raise BadInput(f"{file} is not a file", fix="fetch or save the checkpoint again")
        if file.stat().st_size > MAX_JSON_BYTES:
            raise BadInput(f"{file} has {file.stat().st_size:,} bytes, too many for a settings file")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from error
    except RecursionError as error:
        raise BadInput(f"{file} is nested too deep", fix="fetch or save the checkpoint again") from error
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file} is not valid JSON ({error})", fix="fetch or save the checkpoint again") from error
    if not isinstance(content, dict):
        raise BadInput(f"{file} does not hold a JSON object", fix="fetch or save the checkpoint again")
    return content


def stored_entries(folder: Path) -> dict[str, TensorEntry]:
    """Return every tensor in a checkpoint's files, by name.

    Raises BadInput for a damaged shard, or if the index names a tensor that its file lacks.
    """
    entries: dict[str, TensorEntry] = {}
    for file in shard_files(folder):
        entries.update(read_entries(file))
    if not (folder / SINGLE_FILE).is_file():
        weight_map = read_weight_map(folder / INDEX_FILE)
        for name, place in weight_map.items():
            if name not in entries or entries[name].file.name != place:
                raise BadInput(
                    f"{folder / place} lacks {name}, which the index lists there", fix="fetch or save it again"
                )
    if not entries:
        raise BadInput(f"{folder} holds no tensors", fix="fetch or save the checkpoint again")
    return entries


def _plain_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def read_tensor(entry: TensorEntry, buffer: Buffer = _plain_memory) -> Tensor:
    """Read one tensor into memory from `buffer`.

    Raises BadInput if the file has shrunk since, or if torch does not have the dtype.
    """
    return entry.read(buffer)


def _read_stored(entry: TensorEntry, buffer: Buffer) -> Tensor:
    if entry.dtype not in DTYPES:
        raise BadInput(
            f"{entry.file} holds {entry.dtype} tensors, which coprune cannot read",
            fix="use a checkpoint of plain weights",
        )
    tensor = buffer(entry.shape, DTYPES[entry.dtype])
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    view = memoryview(raw)
    if len(view) != entry.nbytes:
        cause = f"{entry.file} has a malformed header: {entry.nbytes:,} bytes for shape {entry.shape}"
        raise BadInput(cause, fix="fetch or save it again")
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        done = 0
        while done < entry.nbytes:
            count = stream.readinto(view[done:])
            if not count:
                raise BadInput(f"{entry.file} was cut off while it was read", fix="fetch or save it again")
            done += count
    return tensor


def read_ahead(entries: Iterable[TensorEntry]) -> None:
    """Ask the system to read tensors into its page cache in the background, where supported (Linux)."""
    if not hasattr(os, "posix_fadvise"):
        return
    stored = sorted((one for entry in entries for one in entry.stored), key=lambda e: (e.file, e.start))
    for file, tensors in groupby(stored, key=lambda entry: entry.file):
        # A missing file is reported when it is read.
        with suppress(OSError), file.open("rb", buffering=0) as stream:
            for entry in tensors:
                os.posix_fadvise(stream.fileno(), entry.start, entry.nbytes, os.POSIX_FADV_WILLNEED)


def _no_weights(folder: Path) -> BadInput:
    """Return the error about a folder without safetensors, depending on what it contains."""
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        cause = f"{folder} holds only pickled weights, which can run code when they are loaded"
        fix = (
            "convert them if you trust them: load with transformers' from_pretrained and save with "
            "save_pretrained, which writes safetensors"
        )
    elif any(folder.glob("*.gguf")):
        cause, fix = f"{folder} holds GGUF files", f"name the file itself, such as {min(folder.glob('*.gguf'))}"
    else:
        cause, fix = f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}", "is it the folder of a saved model?"
    return BadInput(cause, field="model", value=str(folder), fix=fix)


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
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class Stored:
    """A tensor's entry in a header: the format's dtype name, shape, and byte range in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header_bytes(file: Path) -> bytes:
    """Return the JSON header of a safetensors file. Raises BadInput if the file is too short for one."""
    try:
        if not file.is_file():  # reading a pipe could block forever
            raise BadInput(f"{file} is not a file", fix="fetch or save it again")
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if 2 <= length <= min(MAX_HEADER_BYTES, file.stat().st_size - 8):
                return stream.read(length)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from error
    raise BadInput(f"{file} is cut off or not a safetensors file", fix="fetch or save it again")


def parse_header(text: bytes) -> dict[str, Stored]:
    """Return the tensors of a header in the order of their data.

    Raises BadInput, without the file's name, for a malformed header.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"not JSON, or a duplicate name: {str(error)[:100]}") from error
    if not isinstance(content, dict):
        raise _malformed("not a JSON object")
    found = {name: _stored(name, entry) for name, entry in content.items() if name != "__metadata__"}
    ordered = sorted(found.items(), key=lambda item: (item[1].begin, item[1].end))
    end = 0
    for name, stored in ordered:
        if stored.begin != end:
            raise _malformed(f"the data of {name!r} begin at {stored.begin:,} instead of {end:,}")
        end = stored.end
    return dict(ordered)


def _stored(name: str, entry: Any) -> Stored:
    try:
        name.encode()
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:  # a name can hold a lone surrogate
        raise _malformed(f"invalid entry for {name!r}") from error
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(one) is int and one >= 0 for one in numbers) or end < begin:
        raise _malformed(f"invalid entry for {name!r}")
    known = DTYPES.get(dtype)
    if known is not None and math.prod(shape) * known.itemsize != end - begin:
        raise _malformed(f"{end - begin:,} bytes for {name!r} of shape {tuple(shape)}")
    return Stored(dtype, tuple(shape), begin, end)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def _malformed(what: str) -> BadInput:
    return BadInput(f"the header is malformed ({what})", fix="fetch or save it again")


logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's name for the configuration of an adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""PEFT's name for the file with its tensors."""
