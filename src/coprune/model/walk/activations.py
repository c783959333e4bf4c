"""Hidden states of all calibration batches on their way through the model: on their device, in host memory, on disk.

Each place has a limit, and takes what does not fit the one before. Those on disk are in one unnamed file; a batch is mapped
while a block uses it, so that it costs the memory of one batch. The bytes, and so the results, are the same in all places.
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
from typing import IO, TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from coprune.base.devices import buffer_for, buffer_size, device_memory, in_host_memory
from coprune.base.errors import CopruneError
from coprune.base.words import Setting

if TYPE_CHECKING:
    from typing_extensions import Buffer


GIB = 1 << 30


@dataclass(frozen=True)
class DeviceRoom:
    """The memory that hidden states may take of a device that has its own."""

    nbytes: int
    asked: bool
    """Whether the user set the limit, which then also covers batches that wait inside a block."""


def device_room(device: torch.device, asked: float | None) -> DeviceRoom | None:
    """Return the memory that hidden states may take of a device: half of the free memory by default (asked: GiB).

    None for host memory, and where the device does not tell.
    """
    if in_host_memory(device):
        return None
    if asked is not None:
        return DeviceRoom(int(asked * GIB), asked=True)
    there = device_memory(device)
    return None if there is None or there.available is None else DeviceRoom(there.available // 2, asked=False)


@dataclass(frozen=True)
class _InHost:
    """A copy in host memory of a tensor of another device."""

    held: Tensor
    device: torch.device

    @property
    def nbytes(self) -> int:
        return buffer_size(self.held.nbytes, self.device)


@dataclass(frozen=True)
class _OnDisk:
    """Location of a tensor in the file: first byte, shape, dtype, and original device."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Activations(Sequence[Tensor]):
    """A list of tensors of which no more than so many bytes are in memory.

    limit: bytes of host memory, None for no limit; folder: where the file of the rest goes (default: the folder for
    temporary files); room: for tensors of a device that has memory of its own, what they may take of that.
    A tensor that was read is good until its place in the list is written again. Raises CopruneError if the disk is full.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor] = (),
        limit: int | None = None,
        folder: Path | None = None,
        room: DeviceRoom | None = None,
    ) -> None:
        self._limit = limit
        self._folder = folder
        self._room = room
        self._places: list[Tensor | _InHost | _OnDisk] = []
        self._in_memory = 0
        self._on_device = 0
        self._elsewhere = False  # whether there are tensors of another device
        self._file = ScratchFile(folder)
        for tensor in tensors:
            self.append(tensor)

    @property
    def folder(self) -> Path | None:
        """Folder of the file; None for the folder for temporary files."""
        return self._folder

    @property
    def spare(self) -> int | None:
        """Bytes that the limits leave for what is computed; None for no limit."""
        if self._elsewhere and self._room is not None:
            return max(0, self._room.nbytes - self._on_device) if self._room.asked else None
        return None if self._limit is None else max(0, self._limit - self._in_memory)

    def copy(self) -> Activations:
        """Return the tensors in a new list with limits of the same size."""
        return Activations(self, self._limit, self._folder, self._room)

    @property
    def bytes_in_memory(self) -> int:
        """Size of the tensors that are kept in host memory."""
        return self._in_memory

    @property
    def bytes_on_device(self) -> int:
        """Size of the tensors that are kept on a device with memory of its own."""
        return self._on_device

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
        if isinstance(place, _InHost):
            # Later copies into this buffer wait for this one, since one device runs them in order.
            return place.held.to(place.device, non_blocking=True)
        return place if isinstance(place, Tensor) else self._map(place)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._places[index] = self._put(tensor, self._places[index])

    def _put(self, tensor: Tensor, old: Tensor | _InHost | _OnDisk | None) -> Tensor | _InHost | _OnDisk:
        """Store a tensor on its device, in host memory or in the file, whichever has room, but never back up."""
        here = in_host_memory(tensor.device)
        self._elsewhere |= not here
        if isinstance(old, _InHost) and old.held.shape == tensor.shape and old.held.dtype == tensor.dtype:
            return _into(old, tensor)
        self._let_go(old)
        if not here and not isinstance(old, _InHost | _OnDisk) and self._fits_device(tensor.nbytes):
            self._on_device += tensor.nbytes
            return tensor
        size = tensor.nbytes if here else buffer_size(tensor.nbytes, tensor.device)
        if not isinstance(old, _OnDisk) and (self._limit is None or self._in_memory + size <= self._limit):
            self._in_memory += size
            return tensor if here else _into(_InHost(buffer_for(tensor), tensor.device), tensor)
        return self._write(tensor, old if isinstance(old, _OnDisk) else None)

    def _fits_device(self, nbytes: int) -> bool:
        if self._room is None:
            return self._limit is None or self._on_device + nbytes <= self._limit
        return self._on_device + nbytes <= self._room.nbytes

    def _let_go(self, old: Tensor | _InHost | _OnDisk | None) -> None:
        if isinstance(old, _InHost) or (isinstance(old, Tensor) and in_host_memory(old.device)):
            self._in_memory -= old.nbytes
        elif isinstance(old, Tensor):
            self._on_device -= old.nbytes

    def _write(self, tensor: Tensor, old: _OnDisk | None) -> _OnDisk:
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


def _into(place: _InHost, tensor: Tensor) -> _InHost:
    """Copy a tensor of a device to host memory; nobody waits for it, since only the device reads it again."""
    place.held.copy_(tensor.detach(), non_blocking=place.held.is_pinned())
    return place


class ScratchFile:
    """Bytes in a file that is made when the first are written.

    folder: where (default: the folder for temporary files). Raises CopruneError if the disk is full.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._end = 0

    @property
    def size(self) -> int:
        """Bytes that were handed out."""
        return self._end

    def extend(self, nbytes: int) -> int:
        """Reserve a piece of the file and return its start, aligned to pages for mapping."""
        start = self._end
        self._end += -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return start

    def write(self, start: int, raw: Buffer) -> None:
        """Write bytes there."""
        rest = memoryview(raw)
        try:
            file = self._opened()
            file.seek(start)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            folder, keep = self._folder or tempfile.gettempdir(), Setting("activation_memory")
            raise CopruneError(
                f"the disk is full: the calibration activations do not fit {folder}",
                fix=("free some space, use fewer samples, or keep more of them in memory with ", keep),
            ) from error

    def read_into(self, start: int, raw: Buffer) -> None:
        """Fill a buffer with what was written there."""
        file: Any = self._opened()
        file.seek(start)
        rest = memoryview(raw)
        while rest:
            rest = rest[file.readinto(rest) :]

    def map(self, start: int, nbytes: int) -> mmap.mmap:
        """Map a piece of the file privately: in-place changes do not reach the file."""
        return mmap.mmap(self._opened().fileno(), nbytes, access=mmap.ACCESS_COPY, offset=start)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._file = _nameless(self._folder)
            weakref.finalize(self, self._file.close)
        return self._file


def _nameless(folder: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="coprune-activations-", dir=folder, buffering=0)
