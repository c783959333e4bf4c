"""The packed format as a way of storing a checkpoint, so that a run can write it without a dense folder in between."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from coprune.model.checkpoint.names import QUANT_METHOD
from coprune.packed.format import Format, pack_tensor, unpack_tensor
from coprune.packed.header import VERSION, is_packed
from coprune.packed.shards import METADATA_KEY, ShardWriter, stored_checksum


@dataclass(frozen=True)
class PackedEncoding:
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

    def configure(self, config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "version": VERSION}


def shard_metadata(packed: Sequence[str], checksums: dict[str, int]) -> dict[str, str]:
    """What a packed file's header says of it. checksums: `stored_checksum` of every tensor."""
    content = {"version": VERSION, "packed": list(packed), "crc32": checksums}
    return {"format": "pt", METADATA_KEY: json.dumps(content, separators=(",", ":"))}
