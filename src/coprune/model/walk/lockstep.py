"""Run one block on all calibration batches in lockstep, so that a matrix can be pruned just before it is first used.

Each batch runs in a lane (a greenlet), which stops at a matrix that is not solved yet. When all lanes have stopped or ended,
the walk solves that matrix and resumes them. So the calibration set passes the block once, and later matrices (o_proj) see the
outputs of pruned ones (q, k, v).

Greenlets instead of threads, so that all lanes share one pool of compute threads and run in a fixed order. A lane only stops
inside `Observe`, where the function mode is off, so the lanes' modes do not interfere.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import greenlet
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coprune.base.devices import in_host_memory
from coprune.model.matrices import Matrix
from coprune.model.walk.activations import ScratchFile
from coprune.model.walk.observe import Observe

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Lane:
    """A batch on its way through a block."""

    def __init__(self, run: Callable[[], Tensor], finish: Callable[[Tensor], None]) -> None:
        self._greenlet = greenlet.greenlet(lambda: finish(run()))
        self._walk: greenlet.greenlet | None = None
        self.waits_for: Matrix | None = None

    @property
    def ended(self) -> bool:
        return bool(self._greenlet.dead)

    def resume(self) -> None:
        """Run until the lane stops at a matrix or ends. An error in the lane is raised here."""
        self.waits_for = None
        self._walk = self._greenlet.parent = greenlet.getcurrent()
        with _own_gradient_mode():
            self._greenlet.switch()

    def stop_at(self, matrix: Matrix) -> None:
        """Suspend the lane until the matrix is solved."""
        self.waits_for = matrix
        assert self._walk is not None
        with _own_gradient_mode():
            self._walk.switch()

    def abandon(self) -> None:
        """End a lane that is no longer needed, without waiting for garbage collection."""
        with _own_gradient_mode():
            self._greenlet.throw()


@contextmanager
def _own_gradient_mode() -> Iterator[None]:
    """Restore the gradient mode, which is per thread and so shared by all lanes and the walk."""
    enabled = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)


@dataclass(frozen=True)
class Lanes:
    """The functions that a block's lanes run."""

    run: Callable[[int], Tensor]
    """Returns the block's output for a batch's number."""
    see: Callable[[int, Matrix, Tensor], None]
    """Called for every product with the batch's number, the matrix and its input."""
    finish: Callable[[int, Tensor], None] | None
    """Called with a batch's number and the block's output. None if outputs are not needed: everything after the block's
    last matrix to solve is then skipped."""
    hear: Callable[[int], Callable[[Tensor], None] | None] = lambda batch: None
    """Returns, for a batch's number, the listener to every product's operand, if any."""


class Lockstep:
    """All lanes of one block.

    batches: number of lanes; lanes: their functions; agree: exchanges the position of the matrix that this process would solve
    next (None if its lanes have ended) for those of all processes; paging: moves tensors of waiting lanes out of memory.
    """

    def __init__(
        self,
        batches: int,
        matrices: Sequence[Matrix],
        lanes: Lanes,
        agree: Callable[[int | None], list[int]] = lambda position: [] if position is None else [position],
        paging: Paging | None = None,
    ) -> None:
        self._matrices = matrices
        self._paging = paging
        self._agree = agree
        self._order = {matrix.name: position for position, matrix in enumerate(matrices)}
        self._solved: set[str] = set()
        self._to_the_end = lanes.finish is not None
        self._lanes = [self._lane(batch, matrices, lanes) for batch in range(batches)]

    def _lane(self, batch: int, matrices: Sequence[Matrix], lanes: Lanes) -> Lane:
        paging, run, see, finish = self._paging, lanes.run, lanes.see, lanes.finish

        def on_product(matrix: Matrix, x: Tensor) -> None:
            if paging is None:
                see(batch, matrix, x)
            else:
                paging.bring(x)
                with paging.paused():
                    see(batch, matrix, x)
            if matrix.name not in self._solved:
                if paging is not None:
                    paging.stop()
                lane.stop_at(matrix)

        hear = lanes.hear(batch)

        def on_operand(x: Tensor) -> None:
            assert hear is not None
            if paging is None:
                hear(x)
            else:
                paging.bring(x)
                with paging.paused():
                    hear(x)

        def observed() -> Tensor:
            with Observe(matrices, on_product, hear=None if hear is None else on_operand):
                return run(batch)

        def end(output: Tensor) -> None:
            if paging is not None:
                paging.release(output)
            if finish is not None:
                finish(batch, output)

        lane = Lane(observed, end)
        return lane

    def next_matrix(self) -> Matrix | None:
        """Run every lane as far as possible; return the matrix to solve next, or None at the end."""
        if not self._to_the_end and self._order.keys() <= self._solved:
            return None
        for lane in self._lanes:
            if not lane.ended and (lane.waits_for is None or lane.waits_for.name in self._solved):
                with self._paging or nullcontext():
                    lane.resume()
        waiting = [lane.waits_for for lane in self._lanes if lane.waits_for is not None and not lane.ended]
        own = self._first(waiting)
        # A process without tokens for an expert still solves it together with the others.
        return self._first([self._matrices[i] for i in self._agree(None if own is None else self._order[own.name])])

    def _first(self, waiting: Sequence[Matrix]) -> Matrix | None:
        if not waiting:
            return None
        # Lanes diverge only inside a mixture, if a batch has no tokens for an expert. Solve the earliest expert first, since
        # lanes cannot go back to it.
        experts = [matrix for matrix in waiting if matrix.expert is not None]
        return min(experts or waiting, key=lambda m: (m.expert if m.expert is not None else 0, self._order[m.name]))

    def solved(self, matrices: Collection[Matrix]) -> None:
        """Mark matrices as final."""
        self._solved.update(matrix.name for matrix in matrices)

    def close(self) -> None:
        """Abandon unfinished lanes, whose output is not needed or whose walk ended early."""
        for lane in self._lanes:
            if not lane.ended:
                lane.abandon()


SMALLEST = 1 << 16
"""Size in bytes below which a storage is not worth paging out."""


@dataclass
class _Place:
    """A storage's bytes, and their offset in the file if it was paged out before."""

    storage: weakref.ref[torch.UntypedStorage]
    nbytes: int
    start: int | None = None
    written: bool = False
    """Whether the file is up to date."""


class Paging(TorchDispatchMode):
    """While active, tracks new storages and pages in those that an operation needs.

    limit: bytes that may stay in memory while a batch waits; folder: of the file (default: the folder for temporary files).
    Sees all operations that go through torch's dispatcher. Raises CopruneError if the disk is full.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit = limit
        self._file = ScratchFile(folder)
        # Keyed by the storage's address, which is far cheaper than weak references.
        self._resident: dict[int, _Place] = {}
        self._emptied: dict[int, _Place] = {}
        self._bytes = 0
        self._free: dict[int, list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Called hundreds of times per batch and block, so it has to be fast.
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
        """Suspend paging in the body, for tensors that outlive the block (statistics)."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]

    def bring(self, tensor: Tensor) -> None:
        """Load a tensor's bytes if they were paged out."""
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
        """Load a tensor and stop managing it."""
        self.bring(tensor)
        self._forget(tensor.untyped_storage()._cdata)

    def stop(self) -> None:
        """Page out the excess while a batch waits: newest first, since the oldest is needed first."""
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
        """Free the file range of a storage that is gone or no longer managed."""
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
    """Return the tensors among an operation's arguments or results, including those in lists."""
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
    """Return a view of a CPU storage's bytes, without NumPy, which would prevent resizing it."""
    return (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
