"""Hidden states of all calibration batches on their way through the model: in memory, or beyond a limit on the disk.

What does not fit the limit lies in one file without a name. A batch is mapped into memory when it is read and unmapped
when the block is done with it, so that it costs the memory of one batch. The bytes are the same in both places, and so
are the results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from coprune.model.walk.scratch import ScratchFile

GIB = 1 << 30


@dataclass(frozen=True)
class _OnDisk:
    """Where a tensor lies in the file: first byte, shape, dtype, and the device that it came from."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Activations(Sequence[Tensor]):
    """A list of tensors of which no more than so many bytes are in memory.

    limit: bytes, None for no limit; folder: where the file of the rest goes (default: the folder for temporary files).
    A tensor that was read from the disk is good until its place in the list is written again.
    Raises CopruneError if the disk is full.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), limit: int | None = None, folder: Path | None = None) -> None:
        self._limit = limit
        self._folder = folder
        self._places: list[Tensor | _OnDisk] = []
        self._in_memory = 0
        self._file = ScratchFile(folder)
        for tensor in tensors:
            self.append(tensor)

    @property
    def folder(self) -> Path | None:
        """Where the file goes; None for the folder for temporary files."""
        return self._folder

    @property
    def spare(self) -> int | None:
        """Bytes that the limit leaves; None for no limit."""
        return None if self._limit is None else max(0, self._limit - self._in_memory)

    def copy(self) -> Activations:
        """The same tensors in a list of their own, under a limit of its own of the same size."""
        return Activations(self, self._limit, self._folder)

    @property
    def bytes_in_memory(self) -> int:
        """Size of the tensors that are kept in memory."""
        return self._in_memory

    @property
    def bytes_on_disk(self) -> int:
        """Size of the file that holds the rest."""
        return self._file.size

    def append(self, tensor: Tensor) -> None:
        """Add a tensor at the end."""
        self._places.append(self._put(tensor, None))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = self._places[index]
        return place if isinstance(place, Tensor) else self._map(place)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        old = self._places[index]
        if isinstance(old, Tensor):
            self._in_memory -= old.nbytes
        self._places[index] = self._put(tensor, old if isinstance(old, _OnDisk) else None)

    def _put(self, tensor: Tensor, old: _OnDisk | None) -> Tensor | _OnDisk:
        if self._limit is None or (old is None and self._in_memory + tensor.nbytes <= self._limit):
            self._in_memory += tensor.nbytes
            return tensor
        fits = old is not None and tensor.nbytes <= old.nbytes
        start = old.start if old is not None and fits else self._file.extend(tensor.nbytes)
        raw: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(start, raw)
        return _OnDisk(start, tensor.shape, tensor.dtype, tensor.device)

    def _map(self, place: _OnDisk) -> Tensor:
        if place.nbytes == 0:
            return torch.empty(place.shape, dtype=place.dtype, device=place.device)
        mapped = self._file.map(place.start, place.nbytes)
        return torch.frombuffer(mapped, dtype=place.dtype).view(place.shape).to(place.device)
