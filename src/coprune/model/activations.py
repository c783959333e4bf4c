"""Hidden states of all calibration batches on their way through the model: in memory, or beyond a limit on the disk.

What does not fit the limit lies in one file without a name, which the system removes whatever becomes of the process.
A batch is mapped into memory when it is read and unmapped when the block is done with it, so that it costs the memory
of one batch. The bytes are the same in both places, and so are the results.
"""

from __future__ import annotations

import errno
import math
import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

import torch
from torch import Tensor

from coprune.errors import CopruneError

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
        self._file: IO[bytes] | None = None
        self._end = 0
        for tensor in tensors:
            self.append(tensor)

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
        return self._end

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
        place = _OnDisk(self._end, tensor.shape, tensor.dtype, tensor.device)
        if old is not None and place.nbytes <= old.nbytes:
            place = _OnDisk(old.start, tensor.shape, tensor.dtype, tensor.device)
        else:
            # A mapping begins at a multiple of the system's pages.
            self._end += -(-place.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._write(place.start, tensor)
        return place

    def _write(self, start: int, tensor: Tensor) -> None:
        try:
            if self._file is None:
                self._file = _nameless_file(self._folder)
                weakref.finalize(self, self._file.close)
            self._file.seek(start)
            raw: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
            rest = memoryview(raw)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            folder = self._folder or tempfile.gettempdir()
            raise CopruneError(
                f"the disk is full: the calibration activations do not fit {folder}. Free some space, use fewer samples, or "
                "allow more of them in memory (--activation-memory)."
            ) from error

    def _map(self, place: _OnDisk) -> Tensor:
        if place.nbytes == 0:
            return torch.empty(place.shape, dtype=place.dtype, device=place.device)
        assert self._file is not None
        # A private mapping: what a model did to its input in place would not reach the file.
        mapped = mmap.mmap(self._file.fileno(), place.nbytes, access=mmap.ACCESS_COPY, offset=place.start)
        return torch.frombuffer(mapped, dtype=place.dtype).view(place.shape).to(place.device)


def _nameless_file(folder: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="coprune-activations-", dir=folder, buffering=0)
