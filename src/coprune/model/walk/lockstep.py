"""Run one block on all calibration batches in step, so that a matrix can be pruned just before it is first used.

Each batch runs in a lane of its own, a greenlet. A lane stops when it comes to a matrix that is not solved yet; when
every lane has stopped or ended, the walk solves what they wait for and lets them go on. So the whole calibration set
crosses the block once, and later matrices (o_proj) see what the earlier ones (pruned q, k, v) really give them.

Greenlets rather than threads: all lanes share one pool of compute threads, nothing runs at the same time, and the
order is the same in every run. A lane only ever stops inside `Observe`, where the function mode is off, so the lanes'
modes do not get entangled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import greenlet
import torch
from torch import Tensor

from coprune.model.matrices import Matrix
from coprune.model.walk.observe import Observe
from coprune.model.walk.paging import Paging


class Lane:
    """One batch on its way through a block."""

    def __init__(self, run: Callable[[], Tensor], finish: Callable[[Tensor], None]) -> None:
        self._greenlet = greenlet.greenlet(lambda: finish(run()))
        self._walk: greenlet.greenlet | None = None
        self.waits_for: Matrix | None = None

    @property
    def ended(self) -> bool:
        return bool(self._greenlet.dead)

    def go_on(self) -> None:
        """Run until the lane stops at a matrix or ends. An error in the lane is raised here."""
        self.waits_for = None
        self._walk = self._greenlet.parent = greenlet.getcurrent()
        with _own_gradient_mode():
            self._greenlet.switch()

    def stop_at(self, matrix: Matrix) -> None:
        """Called from inside the lane: hand control back to the walk until the matrix is solved."""
        self.waits_for = matrix
        assert self._walk is not None
        with _own_gradient_mode():
            self._walk.switch()

    def abandon(self) -> None:
        """End a lane that is not wanted any more, now rather than whenever it would be collected."""
        with _own_gradient_mode():
            self._greenlet.throw()


@contextmanager
def _own_gradient_mode() -> Iterator[None]:
    """Come back to the gradient mode of before: it belongs to the thread, and so is shared by all lanes and the walk."""
    enabled = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)


@dataclass(frozen=True)
class Lanes:
    """What the lanes of a block do."""

    run: Callable[[int], Tensor]
    """From a batch's number to the block's output for it."""
    see: Callable[[int, Matrix, Tensor], None]
    """Called for every product with the batch's number, the matrix and its input."""
    finish: Callable[[int, Tensor], None] | None
    """Called with a batch's number and the block's output. None: nobody wants that, so what comes after the block's last
    matrix to solve is not computed."""
    hear: Callable[[int], Callable[[Tensor], None] | None] = lambda batch: None
    """From a batch's number to what is told of every product's operand, if anything is."""


class Lockstep:
    """All lanes of one block.

    batches: how many lanes there are; lanes: what they do; agree: turns the position of the matrix that this process
    would solve next (None if its lanes have ended) into the positions of all processes that walk in step; paging: takes
    what waiting lanes hold out of memory.
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
        """Let every lane run as far as it can; return the matrix to solve next, or None when there is nothing left to do."""
        if not self._to_the_end and self._order.keys() <= self._solved:
            return None
        for lane in self._lanes:
            if not lane.ended and (lane.waits_for is None or lane.waits_for.name in self._solved):
                with self._paging or nullcontext():
                    lane.go_on()
        waiting = [lane.waits_for for lane in self._lanes if lane.waits_for is not None and not lane.ended]
        own = self._first(waiting)
        # A process whose own lanes have no token for an expert still solves it together with the others.
        return self._first([self._matrices[i] for i in self._agree(None if own is None else self._order[own.name])])

    def _first(self, waiting: Sequence[Matrix]) -> Matrix | None:
        if not waiting:
            return None
        # Lanes part only inside a mixture, where one batch has no tokens for an expert. The expert that comes first is
        # solved first: whoever waits further on cannot come back to it.
        experts = [matrix for matrix in waiting if matrix.expert is not None]
        return min(experts or waiting, key=lambda m: (m.expert if m.expert is not None else 0, self._order[m.name]))

    def solved(self, matrices: Collection[Matrix]) -> None:
        """Note that these matrices have their final weights."""
        self._solved.update(matrix.name for matrix in matrices)

    def close(self) -> None:
        """Let go of lanes that have not ended: nobody wants their output, or the walk was left early."""
        for lane in self._lanes:
            if not lane.ended:
                lane.abandon()
