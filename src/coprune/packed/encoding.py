"""The packed format as a way of storing a checkpoint, so that a run can write it without a dense folder in between."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.model.checkpoint.encoding import Encoding, Place, keep_place
from coprune.model.checkpoint.names import QUANT_METHOD
from coprune.model.checkpoint.shards import DTYPES, parse_header, read_header_bytes
from coprune.packed.format import Format, check_packed, pack_tensor, unpack_tensor
from coprune.packed.header import ALIGNMENT, VERSION, Header, is_packed, read_header


@dataclass(frozen=True)
class PackedEncoding(Encoding):
    """Kept values and where they are; a tensor that would not shrink stays dense."""

    format: Format = "auto"
    name = "packed"

    def write(self, file: Path, names: Sequence[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
        packed: list[str] = []
        checksums: dict[str, int] = {}
        with ShardWriter(file, list(names)) as writer:
            for name, tensor in tensors:
                blob = pack_tensor(tensor, self.format)
                if blob is not None:
                    packed.append(name)
                stored = tensor if blob is None else blob
                checksums[name] = stored_checksum(stored)
                writer.add(name, stored)
            writer.finish(shard_metadata(packed, checksums))

    def decode(self, stored: Tensor) -> Tensor:
        return unpack_tensor(stored) if is_packed(stored) else stored

    def configure(self, config: dict[str, Any], place: Place = keep_place) -> None:
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "version": VERSION}


def shard_metadata(packed: Sequence[str], checksums: dict[str, int]) -> dict[str, str]:
    """Return the metadata of a packed file's header. checksums: `stored_checksum` of every tensor."""
    content = {"version": VERSION, "packed": list(packed), "crc32": checksums}
    return {"format": "pt", METADATA_KEY: json.dumps(content, separators=(",", ":"))}


METADATA_KEY = "coprune"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the raw little-endian bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Convert errors of safetensors into BadInput with the file's name."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read as safetensors ({error})", fix="it may be cut off") from error
    except BadInput as error:
        raise error.within(str(path)) from error


def stored_order(header: bytes) -> dict[str, int]:
    """Return names in the order of their data, and the bytes of each. Raises BadInput for an invalid header."""
    return {name: stored.end - stored.begin for name, stored in parse_header(header).items()}


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a safetensors file in the order of its data. Raises BadInput if it cannot be read."""
    with readable(path):
        names = stored_order(read_header_bytes(path))
    with readable(path), safe_open(str(path), framework="pt") as file:
        for name in names:
            yield name, file.get_tensor(name)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return a shard's metadata: version, names of packed tensors, checksums of dense ones.

    Empty for a file without any. Raises BadInput if they cannot be read.
    """
    with readable(path), safe_open(str(path), framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return {}
    try:
        metadata = json.loads(text)
        version, checksums = metadata["version"], metadata["crc32"]
        if version == VERSION and isinstance(checksums, dict) and all(isinstance(n, str) for n in metadata["packed"]):
            return dict(metadata)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: coprune's part of the header is damaged") from error
    raise BadInput(
        f"{path} has version {version} of the packed format, and this coprune reads version {VERSION}",
        fix="update coprune",
    )


def stored_checksum(tensor: Tensor) -> int:
    """Return a tensor's CRC-32: of a packed one that in its header, else of its bytes."""
    return read_header(tensor).checksum if is_packed(tensor) else zlib.crc32(tensor_bytes(tensor))


def check_shard(path: Path) -> dict[str, Header | None]:
    """Check every tensor of a packed file against its checksum.

    Returns every tensor's header, None for those that are not packed.
    """
    metadata = read_metadata(path)
    checksums = metadata.get("crc32", {})
    headers: dict[str, Header | None] = {}
    for name, tensor in read_tensors(path):
        headers[name] = None
        with named(path, name):
            if is_packed(tensor):
                headers[name] = check_packed(tensor)
            elif name in metadata.get("packed", []):
                raise BadInput("it should be packed and is not", fix="copy or pack the model again")
            # For packed tensors too, since a swapped one is valid in itself.
            if name in checksums and stored_checksum(tensor) != checksums[name]:
                raise BadInput("the checksum does not match", fix="copy or pack the model again")
    missing = (set(checksums) | set(metadata.get("packed", []))) - headers.keys()
    if missing:
        raise BadInput(f"{path}: {sorted(missing)[0]} is missing", fix="copy or pack the model again")
    return headers


@contextmanager
def named(path: Path, name: str) -> Iterator[None]:
    """Add file and tensor to a BadInput."""
    try:
        yield
    except BadInput as error:
        raise error.within(f"{path}: tensor {name}") from error


def _room_of(name: str) -> int:
    """Return the header bytes of a tensor: its own entry and, quoted again, two in coprune's metadata."""
    once = json.dumps(name)
    twice = len(json.dumps(once))
    return len(once) + twice + max(256, twice + 128)


class ShardWriter:
    """Writes a safetensors file tensor by tensor. The file must not be used before `finish`."""

    def __init__(self, path: Path, names: list[str]) -> None:
        """Open a file. names: of all tensors that may be added, for which the header has room."""
        room = 512 + sum(map(_room_of, names))
        self.header_bytes = -(-(8 + room) // ALIGNMENT) * ALIGNMENT - 8
        self.file = path.open("wb")
        self.file.seek(8 + self.header_bytes)
        self.entries: dict[str, dict[str, Any]] = {}
        self.end = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one contiguous CPU tensor."""
        data = tensor_bytes(tensor)
        self.file.write(data)
        offsets = [self.end, self.end + data.nbytes]
        self.entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        self.end = offsets[1]

    def finish(self, metadata: dict[str, str]) -> None:
        """Write the header and close the file."""
        header = json.dumps({"__metadata__": metadata, **self.entries}, separators=(",", ":")).encode()
        self.file.seek(0)
        self.file.write(struct.pack("<Q", self.header_bytes) + header.ljust(self.header_bytes, b" "))
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
