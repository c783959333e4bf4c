"""The inputs of a block's matrices, gathered while its batches run.

Matrices with the same input tensor share one `Inputs`, recorded at the first one's product.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.errors import NumericalError, UnsupportedModel
from coprune.base.precision import total
from coprune.base.processes import Processes
from coprune.base.reading import reading_later
from coprune.base.words import Set
from coprune.model.matrices import Matrix
from coprune.model.walk.statistics import Statistic


class InputSample:
    """A sample of a matrix's input tokens, evenly spaced over every batch, to measure layer errors on.

    A Gram matrix would give the exact error but costs as much as the products themselves. For methods that do not need one,
    about a thousand tokens give the error within a few per cent, far more cheaply.
    """

    tokens = 1024

    def __init__(self, width: int, batches: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self._device = device
        self._per_batch = max(1, -(-self.tokens // max(batches, 1)))
        self._rows: list[Tensor] = []
        self.count = 0  # tokens seen, not sampled

    def update(self, x: Tensor, kept: int | None = None) -> None:
        """Sample rows of a batch of inputs (T × I, any leading dimensions). kept: maximum number; None for the same as for
        every other batch."""
        kept = self._per_batch if kept is None else kept
        x_TI = x.reshape(-1, self.width)
        self.count += x_TI.shape[0]
        step = max(1, x_TI.shape[0] // kept)
        self._rows.append(x_TI[step // 2 :: step][:kept].to(torch.float32, copy=True))

    def reduce(self, processes: Processes, needed: bool) -> None:
        """Combine the samples of all processes in place. needed: whether the rows are needed, or only the count."""
        if needed:
            self.restore(*processes.gather_rows(self.inputs, self.count, self.tokens))
        else:
            self.count = sum(processes.gather(self.count))

    def restore(self, inputs: Tensor, count: int) -> None:
        """Restore stored rows. inputs: N × I float32; count: number of tokens that they were sampled from."""
        self._rows = [inputs]
        self.count = count

    def merge(self, other: InputSample, every: int) -> None:
        """Add a sample of the same width. every: take one in this many of its rows."""
        self._rows.append(other.inputs[::every].clone())  # not a view of all rows
        self.count += other.count

    @property
    def inputs(self) -> Tensor:
        """Sampled inputs, N × I float32 (N = 0 if no token was seen)."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.width, device=self._device)

    def squared_errors(self, weight: Tensor, pruned: Tensor) -> Tensor:
        """Return ‖X(W − Ŵ)ᵀ‖² and ‖XWᵀ‖² on the sampled tokens (2 float64). weight, pruned: O × I."""
        x = self.inputs
        return torch.stack([total((x @ rows.T).square()) for rows in (weight - pruned, weight)])


@dataclass(frozen=True)
class _Routed:
    """Mask of a product's counted rows."""

    counted: Tensor
    twins: Tensor | None = None
    """2 × P: pairs of equal rows that cannot be told apart although only some of them are counted."""

    def fits(self, rows: Tensor) -> bool:
        """Return whether the rows of a later product may belong to the same tokens: equal rows stay equal up to rounding."""
        if len(rows) != len(self.counted):
            return False
        if self.twins is None:
            return True
        one, other = rows[self.twins[0]].to(torch.float32), rows[self.twins[1]].to(torch.float32)
        return bool(((one - other).norm(dim=1) <= 0.02 * one.norm(dim=1)).all())


class CountedRows:
    """The counted rows of one batch's products while it runs through one block."""

    def __init__(self, counted: Tensor) -> None:
        """Select the tokens that count. counted: B × S bool."""
        self._shape, self._all = tuple(counted.shape), bool(counted.all())
        self._counted = counted.flatten()
        self._known: list[Tensor] = []  # row keys of operands with one row per token, newest last
        self._latest: weakref.ref[Tensor] | None = None
        self._routed: dict[int | str, _Routed] = {}  # by expert, of its last product

    def hear(self, x: Tensor) -> None:
        """Remember the operand of any product, to recognise routed tokens later."""
        if self._all or not self._in_order(x) or (self._latest is not None and self._latest() is x):
            return
        self._latest = weakref.ref(x)
        self._known.append(_keys(x.reshape(len(self._counted), -1)))

    def of(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Return the counted rows of a matrix's input: N × I.

        Raises:
            UnsupportedModel: it is unknown which tokens the rows belong to.
        """
        return x if self._all else x.reshape(-1, x.shape[-1])[self._rows(matrix, x)]

    def _rows(self, matrix: Matrix, x: Tensor) -> Tensor:
        if x.ndim > 2 and matrix.expert is None and tuple(x.shape[:2]) == self._shape:
            return self._counted.repeat_interleave(x.shape[2:-1].numel())
        rows = x.reshape(-1, x.shape[-1])
        # Keyed by the expert, since its products may be in different modules.
        expert = matrix.name.rpartition(".")[0] if matrix.expert is None else matrix.expert
        found = self._found_again(_keys(rows))
        if found is None and expert in self._routed and self._routed[expert].fits(rows):
            found = self._routed[expert]
        if found is None and self._in_order(x):
            found = _Routed(self._counted)
        if found is None:
            raise UnsupportedModel(
                f"{matrix.name} is multiplied with rows whose tokens are unknown",
                fix=("count all tokens with ", Set("calibrate_on", "all")),
            )
        self._routed[expert] = found
        return found.counted

    def _found_again(self, keys: Tensor) -> _Routed | None:
        """Return which rows are counted, if all of them occur in an operand with one row per token."""
        keys, order = keys.sort(stable=True)
        # Equal rows are matched in order; the sums do not depend on the choice.
        number = torch.arange(len(keys), device=keys.device) - torch.searchsorted(keys, keys)
        for known in reversed(self._known):
            rows, places = known.sort(stable=True)
            at = (torch.searchsorted(rows, keys) + number).clamp(max=len(rows) - 1)
            if torch.equal(rows[at], keys):
                counted = self._counted[places[at]]
                equal = keys[1:] == keys[:-1]
                mixed = bool((equal & (counted[1:] != counted[:-1])).any())
                twins = torch.stack([order[1:][equal], order[:-1][equal]]) if mixed else None
                return _Routed(torch.zeros_like(counted).scatter(0, order, counted), twins)
        return None

    def _in_order(self, x: Tensor) -> bool:
        """Return whether there is one row per token."""
        sizes = [size for size in x.shape[:-1] if size != 1]
        return sizes in ([size for size in self._shape if size != 1], [len(self._counted)])


def _keys(rows: Tensor) -> Tensor:
    """Hash each row, so that equal rows share a key: T int64. rows: T × I, of any floating dtype."""
    width = rows.shape[1]
    # A hash of the bits, which widening the dtype preserves: a sum weighted with odd numbers, modulo 2⁶⁴.
    bits = rows.detach().to(torch.float32).contiguous().view(torch.int32).to(torch.int64)
    generator = torch.Generator().manual_seed(width)
    weights = torch.randint(-(2**63), 2**63 - 1, (width,), dtype=torch.int64, generator=generator) | 1
    return (bits * weights.to(rows.device)).sum(dim=1)


@dataclass
class Inputs:
    """The statistic and the sample of one tensor that feeds one or more matrices."""

    statistic: Statistic | None
    sample: InputSample
    pool: Statistic | None = None
    """For an expert: the merged statistic of its layer's experts, as far as known."""

    def update(self, x: Tensor, kept: int | None = None) -> None:
        """Add a batch's rows. kept: as in `InputSample.update`."""
        if x.numel() == 0:
            return
        self.sample.update(x, kept)
        if self.statistic is not None:
            self.statistic.update(x)

    def merge(self, other: Inputs, every: int) -> None:
        """Add another tensor's inputs. every: as in `InputSample.merge`."""
        self.sample.merge(other.sample, every)
        if self.statistic is not None and other.statistic is not None:
            self.statistic.merge(other.statistic)

    def refuse_infinite(self, place: str) -> None:
        """Raise NumericalError if inputs on a device were NaN or infinite. place: names them in the message."""
        if self.statistic is not None and not in_host_memory(next(iter(self.statistic.sums.values())).device):
            self.statistic.refuse_infinite(place)

    def reduce(self, processes: Processes) -> None:
        """Combine the inputs of all processes in place, before their use."""
        if processes.size == 1:
            return
        if self.statistic is not None:
            self.statistic.reduce(processes)
        self.sample.reduce(processes, needed=self.statistic is None or not self.statistic.computes_errors)


class BatchRows(NamedTuple):
    """The rows used from one batch."""

    counted: CountedRows | None = None
    """Counted rows; None for all."""
    kept: int | None = None
    """Number of sampled rows; None for the same as for every other batch."""


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
        """Prepare to gather. batches: the rows used of each; known: earlier inputs, by the name of a group's first matrix."""
        self._groups = {group[0].name: group for group in groups}
        self._leader = {matrix.name: group[0].name for group in groups for matrix in group}
        self._statistic = statistic
        self._batches = batches
        self._processes = processes
        self._inputs: dict[str, Inputs] = dict(known or {})
        self._complete: set[str] = set()
        self._pools: dict[str, Statistic] = {}

    def see(self, batch: int, matrix: Matrix, x: Tensor) -> None:
        """Record one product. The first matrix of a group stands for all of them."""
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
        """Return the listener to every product's operand in a batch; None if it is not needed."""
        counted = self._batches[batch].counted
        return None if counted is None else counted.hear

    def _of(self, leader: str, width: int, device: torch.device) -> Inputs:
        if leader not in self._inputs:
            statistic = None if self._statistic is None else self._statistic(width, device)
            self._inputs[leader] = Inputs(statistic, InputSample(width, len(self._batches), device))
        return self._inputs[leader]

    def take(self, matrix: Matrix) -> tuple[list[Matrix], Inputs]:
        """Remove a group and return it with its inputs."""
        leader = self._leader[matrix.name]
        self._finish(leader)
        return self._groups.pop(leader), self._inputs.pop(leader)

    def take_all(self) -> Iterator[tuple[list[Matrix], Inputs]]:
        """Yield all remaining groups in order, and remove them."""
        # Complete all of them first, so that every expert's pool covers its whole layer.
        with reading_later():
            for leader in self._groups:
                self._finish(leader)
        while self._groups:
            yield self.take(next(iter(self._groups.values()))[0])

    def _finish(self, leader: str) -> None:
        """Complete the inputs of a group after its last data."""
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
        """Return the merged statistic of the experts that share this one's parameter.

        In `block` and `dense` propagation it covers all of them when the first is yielded. In `sequential` it covers only the
        expert itself and those before it.
        """
        layer = matrix.name.partition("[")[0]
        if layer not in self._pools:
            self._pools[layer] = type(statistic)(matrix.shape[1], matrix.stored().device)
        self._pools[layer].merge(statistic)
        return self._pools[layer]
