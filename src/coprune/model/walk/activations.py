"""Hidden states of all calibration batches between blocks: on the device, in host memory, or on disk.

Each tier has a limit and spills to the next. The disk tier is one unnamed file, whose batches are mapped while a block uses
them, so that it costs the memory of one batch. Results do not depend on the tier.
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
    """Limit on hidden states in a device's own memory."""

    nbytes: int
    asked: bool
    """Whether the user set the limit; it then also covers batches that wait inside a block."""


def device_room(device: torch.device, asked: float | None) -> DeviceRoom | None:
    """Return the limit on hidden states in a device's memory: half of the free memory by default.

    asked: the user's limit in GiB. Returns None for host memory, or if the free memory is unknown.
    """
    if in_host_memory(device):
        return None
    if asked is not None:
        return DeviceRoom(int(asked * GIB), asked=True)
    there = device_memory(device)
    return None if there is None or there.available is None else DeviceRoom(there.available // 2, asked=False)


@dataclass(frozen=True)
class _InHost:
    """A host copy of a device's tensor."""

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
    """A list of tensors with a limit on memory; the rest is on disk.

    limit: bytes of host memory, None for no limit; folder: of the file (default: the folder for temporary files); room:
    limit for the tensors of a device with its own memory.
    A tensor that was read is valid until its entry in the list is written again. Raises CopruneError if the disk is full.
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
        self._elsewhere = False  # whether some tensors are on a device
        self._file = ScratchFile(folder)
        for tensor in tensors:
            self.append(tensor)

    @property
    def folder(self) -> Path | None:
        """Folder of the file; None for the folder for temporary files."""
        return self._folder

    @property
    def spare(self) -> int | None:
        """Bytes within the limits that are still free for computing; None for no limit."""
        if self._elsewhere and self._room is not None:
            return max(0, self._room.nbytes - self._on_device) if self._room.asked else None
        return None if self._limit is None else max(0, self._limit - self._in_memory)

    def copy(self) -> Activations:
        """Copy the tensors to a new list with the same limits."""
        return Activations(self, self._limit, self._folder, self._room)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of tensors in host memory."""
        return self._in_memory

    @property
    def bytes_on_device(self) -> int:
        """Bytes of tensors on a device with its own memory."""
        return self._on_device

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the file with the rest."""
        return self._file.size

    def append(self, tensor: Tensor) -> None:
        """Append a tensor."""
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
            # A later copy into this buffer waits for this one, since a device runs them in order.
            return place.held.to(place.device, non_blocking=True)
        return place if isinstance(place, Tensor) else self._map(place)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._places[index] = self._put(tensor, self._places[index])

    def _put(self, tensor: Tensor, old: Tensor | _InHost | _OnDisk | None) -> Tensor | _InHost | _OnDisk:
        """Store a tensor in the first tier with room, but never in a higher one than before."""
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
    """Copy a device's tensor to host memory without waiting, since only the device reads it again."""
    place.held.copy_(tensor.detach(), non_blocking=place.held.is_pinned())
    return place


class ScratchFile:
    """Bytes in an unnamed file that is created on the first write.

    folder: of the file (default: the folder for temporary files). Raises CopruneError if the disk is full.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._end = 0

    @property
    def size(self) -> int:
        """Reserved bytes."""
        return self._end

    def extend(self, nbytes: int) -> int:
        """Reserve a range of the file and return its start, aligned to pages for mapping."""
        start = self._end
        self._end += -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return start

    def write(self, start: int, raw: Buffer) -> None:
        """Write bytes at an offset."""
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
        """Read into a buffer from an offset."""
        file: Any = self._opened()
        file.seek(start)
        rest = memoryview(raw)
        while rest:
            rest = rest[file.readinto(rest) :]

    def map(self, start: int, nbytes: int) -> mmap.mmap:
        """Map a range of the file privately: in-place changes do not reach the file."""
        return mmap.mmap(self._opened().fileno(), nbytes, access=mmap.ACCESS_COPY, offset=start)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._file = _nameless(self._folder)
            weakref.finalize(self, self._file.close)
        return self._file


def _nameless(folder: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="coprune-activations-", dir=folder, buffering=0)
