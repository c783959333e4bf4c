"""What batches hold while they wait inside a block, out of memory: for calibration activations that have a limit.

Every tensor that a block makes is noted. Where a batch stops, the storages that are too many go to a file and are emptied;
an operation that is given one of them gets its memory and its bytes back first. So every tensor and view in the waiting
frames is as it was, and what is not used again is never read. The bytes are the same, and so are the results.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from coprune.model.scratch import ScratchFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

SMALLEST = 1 << 16
"""Bytes of a storage below which it is not worth a place in the file."""


@dataclass
class _Place:
    """A storage's bytes, and where they lie in the file if it was emptied before."""

    nbytes: int
    start: int | None = None
    resident: bool = True
    written: bool = False
    """Whether the file has the bytes as they are now."""


class Paging(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, notes the storages that come into being and brings back those that an operation needs.

    limit: bytes of them that may stay in memory when a batch stops; folder: of the file (default: the folder for temporary
    files). Only operations of torch's dispatcher are seen, as all of torch's own are. Raises CopruneError if the disk is full.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit = limit
        self._file = ScratchFile(folder)
        self._places: Any = WeakIdKeyDictionary()
        self._resident: dict[int, tuple[weakref.ref[torch.UntypedStorage], _Place]] = {}  # by the place's identity
        self._bytes = 0
        self._free: dict[int, list[int]] = {}
        self._noting = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = list(_tensors((args, kwargs)))
        for tensor in given:
            self.bring(tensor)
            if func._schema.is_mutable and (place := self._places.get(tensor.untyped_storage())) is not None:
                place.written = False
        result = func(*args, **(kwargs or {}))
        if self._noting:
            known = {tensor.untyped_storage()._cdata for tensor in given}
            for tensor in _tensors(result):
                if tensor.untyped_storage()._cdata not in known:
                    self._note(tensor.untyped_storage())
        return result

    @contextmanager
    def not_noting(self) -> Iterator[None]:
        """For a while, note nothing: for tensors that others keep (statistics)."""
        before, self._noting = self._noting, False
        try:
            yield
        finally:
            self._noting = before

    def bring(self, tensor: Tensor) -> None:
        """See to it that a tensor has its bytes."""
        storage = tensor.untyped_storage()
        place = self._places.get(storage)
        if place is None or place.resident:
            return
        storage.resize_(place.nbytes)
        if storage.device.type == "cpu":
            self._file.read_into(place.start, _memory_of(storage))
        else:
            raw = bytearray(place.nbytes)
            self._file.read_into(place.start, raw)
            _bytes_of(storage).copy_(torch.frombuffer(raw, dtype=torch.uint8))
        self._admit(storage, place)

    def release(self, tensor: Tensor) -> None:
        """Bring a tensor back for good: others keep it from now on."""
        self.bring(tensor)
        place = self._places.pop(tensor.untyped_storage(), None)
        if place is not None:
            self._dismiss(place)

    def stop(self) -> None:
        """Empty what is too much, now that a batch waits: the newest first, since the oldest is needed again first."""
        with self.not_noting():
            for reference, place in reversed(list(self._resident.values())) if self._bytes > self._limit else ():
                storage = reference()
                if storage is not None and self._bytes > self._limit:
                    self._empty(storage, place)

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._places or storage.nbytes() < SMALLEST or not storage.resizable():
            return
        self._places[storage] = place = _Place(storage.nbytes())
        self._admit(storage, place)
        weakref.finalize(storage, self._forget, place)

    def _admit(self, storage: torch.UntypedStorage, place: _Place) -> None:
        place.resident = True
        self._resident[id(place)] = weakref.ref(storage), place
        self._bytes += place.nbytes

    def _dismiss(self, place: _Place) -> None:
        if self._resident.pop(id(place), None) is not None:
            self._bytes -= place.nbytes
        place.resident = False

    def _forget(self, place: _Place) -> None:
        """A storage is gone: its piece of the file is free."""
        self._dismiss(place)
        if place.start is not None:
            self._free.setdefault(place.nbytes, []).append(place.start)

    def _empty(self, storage: torch.UntypedStorage, place: _Place) -> None:
        if place.start is None:
            free = self._free.get(place.nbytes)
            place.start = free.pop() if free else self._file.extend(place.nbytes)
        if not place.written:
            here = storage if storage.device.type == "cpu" else _bytes_of(storage).cpu().untyped_storage()
            self._file.write(place.start, _memory_of(here))
            place.written = True
        storage.resize_(0)
        self._dismiss(place)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results. Written out, for it is called for each of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory_of(storage: torch.UntypedStorage) -> Buffer:
    """The bytes of a storage on the CPU, in place. Not by way of NumPy, which would forbid to empty it."""
    return (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
