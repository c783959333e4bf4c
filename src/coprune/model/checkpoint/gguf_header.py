"""The metadata of a GGUF file and its size, checked before any tensor is read and before torch is imported."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coprune.base.errors import BadInput
from coprune.base.validation import explain

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_TEXT, _ARRAY = 8, 9
_LONGEST = 1 << 30
_ALIGNMENT, _MOST_AXES = 32, 8
Count = Annotated[int, Field(ge=0)]


class GgufHeader(BaseModel):
    """The metadata of a file that coprune relies on."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    architecture: Annotated[str, Field(min_length=1)] | None = Field(None, alias="general.architecture")
    part: Count | None = Field(None, alias="split.no")
    parts: Count | None = Field(None, alias="split.count")
    whole: Count | None = Field(None, alias="split.tensors.count")
    """Number of tensors in all parts."""
    tensors: Count = Field(0, alias="tensors")
    """Number of tensors in this file."""


def gguf_parts(file: Path) -> list[Path]:
    """Return the files of a GGUF model: the file itself, or all parts of `NAME-00001-of-00003.gguf`.

    Raises BadInput if a part is missing, or the file's name gives an impossible number.
    """
    found = _PART.fullmatch(file.name)
    if found is None:
        return [file]
    count = int(found["count"])
    if not 1 <= int(found["number"]) <= count:
        raise BadInput(
            f"{file.name} says that it is part {int(found['number'])} of {count}",
            field="model",
            value=str(file),
            fix="restore the name that it was published under",
        )
    names = [f"{found['name']}-{number:05d}-of-{found['count']}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise BadInput(
            f"{file.name} is one of {count} parts, but {missing[0]} is not beside it",
            field="model",
            value=str(file),
            fix="fetch it too",
        )
    return [file.parent / name for name in names]


def read_gguf_headers(file: Path) -> list[tuple[GgufHeader, dict[str, int]]]:
    """Return the headers of a GGUF file's parts, each with its integers by key.

    Raises BadInput for truncated or malformed metadata, for a file without an architecture, and for parts that do not belong
    together.
    """
    files = gguf_parts(file)
    found = [_header(part) for part in files]
    headers = [header for header, _ in found]
    if headers[0].architecture is None:
        raise BadInput(
            f"{files[0]} has no general.architecture, so its tensors cannot be interpreted", fix="fetch it again"
        )
    for number, (part, header) in enumerate(zip(files, headers, strict=True)):
        if len(files) > 1 and (header.part, header.parts) != (number, len(files)):
            said = "not one of several parts" if header.part is None else f"part {header.part + 1} of {header.parts}"
            raise BadInput(
                f"{part.name} is {said} by its metadata, but part {number + 1} of {len(files)} by its name",
                fix="fetch it again",
            )
    tensors = sum(header.tensors for header in headers)
    if headers[0].whole not in (None, tensors):
        raise BadInput(
            f"the parts of {file.name} hold {tensors} tensors, but the first says {headers[0].whole}",
            fix="fetch them again",
        )
    return found


def _header(file: Path) -> tuple[GgufHeader, dict[str, int]]:
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise BadInput(f"{file} is cut off or not a GGUF file", fix="fetch it again")
            version, tensors, entries = struct.unpack("<IQQ", stream.read(20))
            if version not in (2, 3):
                raise BadInput(
                    f"{file} is GGUF version {version}; versions 2 and 3 are supported", fix="convert it again"
                )
            said = dict(_metadata(file, stream, entries))
            needed = _end_of_tensors(stream, tensors, said.get("general.alignment") or _ALIGNMENT)
            if (size := stream.seek(0, 2)) < needed:
                raise BadInput(f"{file} is cut off: it has {size:,} of {needed:,} bytes", fix="fetch it again")
        header = GgufHeader.model_validate({**said, "tensors": tensors})
    except ValidationError as error:
        raise explain(error).within(str(file)) from error
    except BadInput:
        raise
    except (struct.error, ValueError, KeyError, OverflowError, OSError, RecursionError) as error:
        raise BadInput(f"{file} is cut off or damaged", fix="fetch it again") from error
    return header, {name: value for name, value in said.items() if isinstance(value, int)}


def _metadata(file: Path, stream: BinaryIO, entries: int) -> Iterator[tuple[str, Any]]:
    """Yield keys with integer and string values; other values are None. A tokenizer's strings have to be UTF-8."""
    for _ in range(entries):
        name = _text(stream).decode()
        (kind,) = struct.unpack("<I", stream.read(4))
        try:
            yield name, _value(stream, kind, name.startswith(("general.architecture", "tokenizer.")))
        except UnicodeDecodeError as error:
            raise BadInput(f"{name} of {file} holds a string that is not UTF-8", fix="fetch it again") from error


def _value(stream: BinaryIO, kind: int, as_text: bool) -> Any:
    if kind in _INTEGERS:
        return struct.unpack(_INTEGERS[kind], stream.read(_SIZES[kind]))[0]
    if kind == _TEXT:
        content = _text(stream)
        return content.decode() if as_text else None
    if kind != _ARRAY:
        stream.seek(_SIZES[kind], 1)
        return None
    inner, count = struct.unpack("<IQ", stream.read(12))
    if inner in _SIZES:
        stream.seek(_SIZES[inner] * count, 1)
    else:
        for _ in range(count):
            _value(stream, inner, as_text)
    return None


def _end_of_tensors(stream: BinaryIO, count: int, alignment: int) -> int:
    """Return the number of bytes that a file with these tensors has. stream: at the first tensor's description."""
    from gguf.constants import GGML_QUANT_SIZES

    end = 0
    for _ in range(count):
        _text(stream)
        (axes,) = struct.unpack("<I", stream.read(4))
        if axes > _MOST_AXES:
            raise ValueError("a tensor of so many axes")
        *shape, kind, start = struct.unpack(f"<{axes}QIQ", stream.read(8 * axes + 12))
        values, size = GGML_QUANT_SIZES.get(kind, (1, 0))  # an unknown type is reported by the reader
        end = max(end, start + math.prod(shape) // values * size)
    return -(-stream.tell() // alignment) * alignment + end if count else stream.tell()


def _text(stream: BinaryIO) -> bytes:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > _LONGEST:
        raise ValueError("a text of this length")
    found = stream.read(length)
    if len(found) < length:
        raise ValueError("cut off")
    return found
