"""What batches hold while they wait inside a block, out of memory: for calibration activations that have a limit.

Every tensor that a block makes is noted. Where a batch stops, the storages that are too many go to a file and are emptied;
an operation that is given one of them gets its memory and its bytes back first. So every tensor and view in the waiting
frames is as it was, and what is not used again is never read. The bytes are the same, and so are the results.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coprune.base.devices import in_host_memory
from coprune.model.walk.scratch import ScratchFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

SMALLEST = 1 << 16
"""Bytes of a storage below which it is not worth a place in the file."""


@dataclass
class _Place:
    """A storage's bytes, and where they lie in the file if it was emptied before."""

    storage: weakref.ref[torch.UntypedStorage]
    nbytes: int
    start: int | None = None
    written: bool = False
    """Whether the file has the bytes as they are now."""


class Paging(TorchDispatchMode):
    """While active, notes the storages that come into being and brings back those that an operation needs.

    limit: bytes of them that may stay in memory when a batch stops; folder: of the file (default: the folder for temporary
    files). Only operations of torch's dispatcher are seen, as all of torch's own are. Raises CopruneError if the disk is full.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit = limit
        self._file = ScratchFile(folder)
        # By the address of the storage, which stays the same until it is gone: far cheaper than by weak references.
        self._resident: dict[int, _Place] = {}
        self._emptied: dict[int, _Place] = {}
        self._bytes = 0
        self._free: dict[int, list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Called some hundred times for every batch and block, so it does little and calls little.
        kwargs = kwargs or {}
        given = set()
        for tensor in _tensors(args, kwargs):
            key = tensor.untyped_storage()._cdata
            given.add(key)
            if key in self._emptied:
                self.bring(tensor)
        if func._schema.is_mutable:
            for key in given & self._resident.keys():
                self._resident[key].written = False
        result = func(*args, **kwargs)
        for tensor in _tensors((result,), {}):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._note(storage)
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For a while, inside of what runs, see nothing: for tensors that others keep (statistics)."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]

    def bring(self, tensor: Tensor) -> None:
        """See to it that a tensor has its bytes."""
        storage = tensor.untyped_storage()
        place = self._emptied.pop(storage._cdata, None)
        if place is None:
            return
        storage.resize_(place.nbytes)
        assert place.start is not None
        if in_host_memory(storage.device):
            self._file.read_into(place.start, _memory_of(storage))
        else:
            raw = bytearray(place.nbytes)
            self._file.read_into(place.start, raw)
            _bytes_of(storage).copy_(torch.frombuffer(raw, dtype=torch.uint8))
        self._admit(storage._cdata, place)

    def release(self, tensor: Tensor) -> None:
        """Bring a tensor back for good: others keep it from now on."""
        self.bring(tensor)
        self._forget(tensor.untyped_storage()._cdata)

    def stop(self) -> None:
        """Empty what is too much, now that a batch waits: the newest first, since the oldest is needed again first."""
        with self.paused():
            for key, place in reversed(list(self._resident.items())) if self._bytes > self._limit else ():
                storage = place.storage()
                if storage is not None and self._bytes > self._limit:
                    self._empty(storage, key, place)

    def _note(self, storage: torch.UntypedStorage) -> None:
        nbytes, key = storage.nbytes(), storage._cdata
        if nbytes < SMALLEST or key in self._resident or not storage.resizable():
            return
        self._admit(key, _Place(weakref.ref(storage, lambda _: self._forget(key)), nbytes))

    def _admit(self, key: int, place: _Place) -> None:
        self._resident[key] = place
        self._bytes += place.nbytes

    def _forget(self, key: int) -> None:
        """A storage is gone, or is not ours any more: its piece of the file is free."""
        place = self._emptied.pop(key, None)
        if place is None:
            place = self._resident.pop(key, None)
            self._bytes -= place.nbytes if place is not None else 0
        if place is not None and place.start is not None:
            self._free.setdefault(place.nbytes, []).append(place.start)

    def _empty(self, storage: torch.UntypedStorage, key: int, place: _Place) -> None:
        if place.start is None:
            free = self._free.get(place.nbytes)
            place.start = free.pop() if free else self._file.extend(place.nbytes)
        if not place.written:
            here = storage if in_host_memory(storage.device) else _bytes_of(storage).cpu().untyped_storage()
            self._file.write(place.start, _memory_of(here))
            place.written = True
        storage.resize_(0)
        self._emptied[key] = self._resident.pop(key)
        self._bytes -= place.nbytes


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, also those in lists."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value, {})
    return found


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory_of(storage: torch.UntypedStorage) -> Buffer:
    """The bytes of a storage on the CPU, in place. Not by way of NumPy, which would forbid to empty it."""
    return (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
