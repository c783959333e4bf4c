"""The rows of a GGUF file's tensors that hold each matrix of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coprune.model.checkpoint.mapped_gguf import decode_into
from coprune.model.matrices import Matrix

Arranged = Callable[[Mapping[str, Tensor]], Iterator[tuple[str, Tensor]]]
"""Yields the tensors of a file, by their names in it, from values by the checkpoint's names."""
ByName = Callable[[Callable[[Matrix], Tensor]], Mapping[str, Tensor]]
"""Returns a value per weight by the checkpoint's names, from values by matrix."""


@dataclass(frozen=True)
class Part:
    """Rows of a file's tensor, with the rows and columns of the matrix that they hold."""

    stored: Any
    """The tensor in gguf's reader."""
    places: Tensor
    """The rows of the tensor, int64."""
    rows: Tensor
    """The matrix's row for each of these rows."""
    columns: Tensor
    """The matrix's column for each of the tensor's columns."""

    def read(self) -> Tensor:
        """Return its values in the file, float32."""
        return self.decode(self.bytes())

    def bytes(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return its bytes in the file, rows × bytes, a copy."""
        found: np.ndarray[Any, np.dtype[np.uint8]]
        found = self.stored.data.reshape(-1, self.stored.data.shape[-1])[self.places.numpy()]
        return found

    def decode(self, data: np.ndarray[Any, Any]) -> Tensor:
        """Return the values of rows of bytes in the tensor's type, float32."""
        values = torch.empty(len(self.places), len(self.columns))
        decode_into(self.stored, data, values)
        return values

    def write(self, file: Path, stored: Tensor) -> None:
        """Replace its bytes in the file. stored: rows × bytes uint8."""
        size = int(self.stored.n_bytes)
        held = np.memmap(file, np.uint8, mode="r+", offset=int(self.stored.data_offset), shape=(size,))
        held.reshape(-1, stored.shape[1])[self.places.numpy()] = stored.numpy()
        held.flush()


def parts_in_file(
    matrices: Sequence[Matrix], by_name: ByName, stored: Mapping[str, Any], arranged: Arranged
) -> dict[str, list[Part]]:
    """Locate each matrix in a file, by name, by arranging tensors of matrix, row and column numbers.

    Args:
        matrices: to locate.
        by_name: as `TextWalk.by_name`.
        stored: the file's tensors in gguf's reader.
        arranged: makes the file's tensors.
    """
    numbers = {matrix.name: torch.tensor([[float(number)]]) for number, matrix in enumerate(matrices)}
    every = torch.arange(max((max(matrix.shape) for matrix in matrices), default=0), dtype=torch.float32)
    owners = _by_row(arranged(by_name(lambda matrix: numbers[matrix.name])))
    rows = _by_row(arranged(by_name(lambda matrix: every[: matrix.shape[0], None])))
    found: dict[str, list[Part]] = {}
    for name, tensor in arranged(by_name(lambda matrix: every[None, : matrix.shape[1]])):
        columns, one, own = tensor.reshape(-1, tensor.shape[-1]), owners.get(name), rows.get(name)
        if one is None or own is None or not bool(columns.isfinite().all()):
            continue
        for number in one.unique().tolist():
            places = (one == number).nonzero().flatten()
            first = columns[places[0]]
            if bool((columns[places] == first).all()):
                part = Part(stored[name], places, own[places].long(), first.long())
                found.setdefault(matrices[int(number)].name, []).append(part)
    return found


def _by_row(arranged: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the value of each row of the tensors whose rows hold one value each, by name."""
    found = {}
    for name, tensor in arranged:
        flat = tensor.reshape(-1, tensor.shape[-1])
        if bool((flat == flat[:, :1]).all()):  # NaN is not
            found[name] = flat[:, 0].clone()
    return found
