"""Write a GGUF file tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from coprune.model.gguf.metadata import Fields, write_fields
from coprune.model.gguf.types import encode, encoded_bytes, file_type


@dataclass(frozen=True)
class Planned:
    """A tensor of the new file: its shape, its type, and the name that it had in the source file."""

    source: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Plan:
    """All of a new file but its values."""

    arch: str
    fields: Fields
    kind: str
    """What most tensors are stored in."""
    tensors: Mapping[str, Planned]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(encoded_bytes(tensor.shape, tensor.kind)[0] for tensor in self.tensors.values())


def write_gguf(file: Path, plan: Plan, values: Callable[[str], Tensor], advance: Callable[[float], None]) -> None:
    """Write a whole file.

    Args:
        file: its name, under which nothing is yet.
        plan: what it holds.
        values: makes a tensor, float32, by its name in the source file.
        advance: is called with the bytes that were written.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    with closing(GGUFWriter(file, plan.arch)) as writer:
        if "general.alignment" in plan.fields:
            writer.data_alignment = plan.fields["general.alignment"].value
        write_fields(writer, plan.fields)
        writer.add_file_type(file_type(plan.kind))
        writer.add_quantization_version(2)  # of the blocks' layout, which has been the same since 2023
        for name, tensor in plan.tensors.items():
            size, stored = encoded_bytes(tensor.shape, tensor.kind)
            plain: Any = {"f32": np.float32, "f16": np.float16}.get(tensor.kind, np.uint8)
            writer.add_tensor_info(name, stored, np.dtype(plain), size, GGMLQuantizationType[tensor.kind.upper()])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.tensors.values():
            encoded = encode(values(tensor.source).reshape(tensor.shape), tensor.kind)
            writer.write_tensor_data(encoded)
            advance(encoded.nbytes)
