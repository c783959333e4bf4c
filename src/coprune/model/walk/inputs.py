"""What a block's matrices are multiplied with, gathered while its batches run.

Matrices fed by the same tensor share one `Inputs`; the first of them to be used speaks for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.errors import NumericalError
from coprune.base.processes import Processes
from coprune.base.reading import reading_later
from coprune.model.matrices import Matrix
from coprune.model.walk.counted import CountedRows
from coprune.model.walk.sample import InputSample
from coprune.model.walk.statistics import Statistic


@dataclass
class Inputs:
    """What is known of one tensor that feeds one or more matrices."""

    statistic: Statistic | None
    sample: InputSample
    pool: Statistic | None = None
    """For an expert: the statistic of all experts of its layer, as far as they are known."""

    def update(self, x: Tensor, kept: int | None = None) -> None:
        """Add a batch's rows. kept: as in `InputSample.update`."""
        if x.numel() == 0:
            return
        self.sample.update(x, kept)
        if self.statistic is not None:
            self.statistic.update(x)

    def refuse_infinite(self, place: str) -> None:
        """Raise NumericalError if inputs on a device were NaN or infinite. place: what they are the inputs of."""
        if self.statistic is not None and not in_host_memory(next(iter(self.statistic.sums.values())).device):
            self.statistic.refuse_infinite(place)

    def reduce(self, processes: Processes) -> None:
        """Complete what is known with what the other processes saw of the same tensor, in place, before it is used."""
        if processes.size == 1:
            return
        if self.statistic is not None:
            self.statistic.reduce(processes)
        self.sample.reduce(processes, needed=self.statistic is None or not self.statistic.tells_errors)


class BatchRows(NamedTuple):
    """What is taken of one batch's rows."""

    counted: CountedRows | None = None
    """Which are counted; None for all."""
    kept: int | None = None
    """How many the sample keeps; None for as many as of every other batch."""


class Gathered:
    """The inputs of one block's groups of matrices while its batches run."""

    def __init__(
        self,
        groups: Sequence[list[Matrix]],
        statistic: type[Statistic] | None,
        batches: Sequence[BatchRows],
        processes: Processes,
        known: Mapping[str, Inputs] | None = None,
    ) -> None:
        """batches: what is taken of each; known: what was gathered before, by the name of a group's first matrix."""
        self._groups = {group[0].name: group for group in groups}
        self._leader = {matrix.name: group[0].name for group in groups for matrix in group}
        self._statistic = statistic
        self._batches = batches
        self._processes = processes
        self._inputs: dict[str, Inputs] = dict(known or {})
        self._complete: set[str] = set()
        self._pools: dict[str, Statistic] = {}

    def see(self, batch: int, matrix: Matrix, x: Tensor) -> None:
        """Note one product. The first matrix of a group speaks for all of them."""
        leader = self._leader[matrix.name]
        if leader != matrix.name:
            return
        counted, kept = self._batches[batch]
        inputs = self._of(leader, x.shape[-1], x.device)
        try:
            inputs.update(x if counted is None else counted.of(matrix, x), kept)
        except NumericalError as error:
            raise error.within(f"{matrix.name}, calibration batch {batch}") from error

    def hear(self, batch: int) -> Callable[[Tensor], None] | None:
        """What is to be told of every product's operand in a batch; None if nobody wants to know."""
        counted = self._batches[batch].counted
        return None if counted is None else counted.hear

    def _of(self, leader: str, width: int, device: torch.device) -> Inputs:
        if leader not in self._inputs:
            statistic = None if self._statistic is None else self._statistic(width, device)
            self._inputs[leader] = Inputs(statistic, InputSample(width, len(self._batches), device))
        return self._inputs[leader]

    def take(self, matrix: Matrix) -> tuple[list[Matrix], Inputs]:
        """Hand out a group and what was gathered for it, and forget it."""
        leader = self._leader[matrix.name]
        self._finish(leader)
        return self._groups.pop(leader), self._inputs.pop(leader)

    def take_all(self) -> Iterator[tuple[list[Matrix], Inputs]]:
        """Hand out all groups that are left, in order."""
        # All of them are complete before the first is shown, so that every expert knows its whole layer.
        with reading_later():
            for leader in self._groups:
                self._finish(leader)
        while self._groups:
            yield self.take(next(iter(self._groups.values()))[0])

    def _finish(self, leader: str) -> None:
        """Complete the inputs of a group, to which nothing will be added any more."""
        if leader in self._complete:
            return
        matrix = self._groups[leader][0]
        inputs = self._of(leader, matrix.shape[1], matrix.stored().device)
        inputs.refuse_infinite(matrix.name)
        inputs.reduce(self._processes)
        if matrix.expert is not None and inputs.statistic is not None:
            inputs.pool = self._pool_of(matrix, inputs.statistic)
        self._complete.add(leader)

    def _pool_of(self, matrix: Matrix, statistic: Statistic) -> Statistic:
        """The merged statistic of the experts that share this one's parameter.

        In `block` and `dense` propagation it holds all of them by the time that the first is shown. In `sequential`
        those further on are not known yet: an expert's pool is then of itself and the experts before it.
        """
        layer = matrix.name.partition("[")[0]
        if layer not in self._pools:
            self._pools[layer] = type(statistic)(matrix.shape[1], matrix.stored().device)
        self._pools[layer].merge(statistic)
        return self._pools[layer]
