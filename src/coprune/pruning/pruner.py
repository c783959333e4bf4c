"""Pruning of the matrices that a walk yields, with a result for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.base.processes import ALONE, Processes
from coprune.base.reading import Reading, reading_later, refuse_if
from coprune.base.words import Set
from coprune.model.matrices import Matrix, checksum_of, mask_bits
from coprune.model.walk.block_events import BlockDone, MatricesReady
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.statistics import Gram, Statistic, ratio_of
from coprune.pruning.distributions import Distributions, distributions_in_host_memory, sampled
from coprune.pruning.methods import METHODS
from coprune.pruning.methods.base import Method, Pruned, prune_by_outputs
from coprune.pruning.refine import Refinement
from coprune.pruning.solver_events import Event
from coprune.recipe.pattern import Target


class MatrixResult(BaseModel):
    """The result of pruning one matrix."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int, int]
    """(out, in)"""
    sparsity: float
    """Fraction of zeros after pruning."""
    relative_layer_error: float | None
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on its calibration inputs, before any reconstruction of the block; None if not measured."""
    tokens: int | None
    """Number of calibration tokens that it saw; for an expert, those routed to it."""
    mask_checksum: str
    """CRC-32 of its zeros, to compare a reloaded matrix by."""
    seconds: float
    events: tuple[Event, ...] = ()
    distributions: Distributions | None = None
    """Distributions of weights, inputs and scores before pruning; saved in a separate file beside the report."""


@dataclass(frozen=True)
class Solver:
    """A method and the refinements of its result."""

    method: Method
    refinements: tuple[Refinement, ...] = ()

    @property
    def statistic(self) -> type[Statistic] | None:
        """Return the statistic to gather. A Gram matrix serves every method that asks for less."""
        return Gram if self.refinements else self.method.statistic

    def solve(self, weight: Tensor, inputs: Inputs | None, target: Target) -> Pruned:
        """Prune one matrix (O × I float32, not modified). Raises NumericalError."""
        statistic, events = usable_statistic(inputs)
        if inputs is not None and statistic is None and self.statistic is not None:
            pruned = METHODS["magnitude"].prune(weight, None, target)
            return pruned._replace(events=(Event(kind="no tokens"),))
        if target.sparsity == 0:
            # If nothing is to be pruned, no method or refinement may change a weight.
            return Pruned(weight, weight != 0, events)
        pruned = prune_by_outputs(self.method, weight, statistic, target)
        for refinement in self.refinements:
            assert isinstance(statistic, Gram)
            pruned = refinement.refine(weight, pruned, statistic, target)
        return pruned._replace(events=events + pruned.events)


def usable_statistic(inputs: Inputs | None) -> tuple[Statistic | None, tuple[Event, ...]]:
    """Return the statistic to prune by, topped up from the layer's for an expert with too few tokens."""
    statistic = None if inputs is None else inputs.statistic
    if inputs is None or statistic is None or statistic.count == 0:
        return None, ()
    if inputs.pool is not None and not bool(statistic.mean_square.any()):
        return None, ()  # an expert that multiplies other experts' tokens by zero
    if inputs.pool is None or statistic.count >= statistic.width:
        return statistic, ()
    event = Event(kind="few tokens", figures={"tokens": statistic.count, "inputs": statistic.width})
    return statistic.topped_up(inputs.pool), (event,)


class Solving:
    """The distribution of matrices over processes: one process prunes each and sends its weights to the others.

    Args:
        processes: those of the run.
        stages: groups whose statistics are known at the same time; their matrices are distributed together, costly ones first.
        at_once: whether results are needed as soon as a group is pruned (`sequential`), or only at the end of the block.
        gram: whether solving a matrix costs more than in proportion to its size, as with a Gram matrix.
    """

    def __init__(
        self,
        processes: Processes = ALONE,
        stages: Iterable[Sequence[Sequence[Matrix]]] = (),
        at_once: bool = False,
        gram: bool = False,
    ) -> None:
        self._processes, self._at_once = processes, at_once
        self._owners: dict[str, int] = {}
        for groups in stages if processes.size > 1 else ():
            self._owners |= share_out(groups, processes.size, gram)
        self._pending: list[Matrix] = []
        self._own: dict[str, MatrixResult] = {}
        self._results: list[MatrixResult] = []

    def _owner(self, matrix: Matrix) -> int:
        return self._owners[matrix.name] if self._processes.size > 1 else self._processes.rank

    def prune(self, matrices: Sequence[Matrix], prune_one: Callable[[Matrix], MatrixResult]) -> None:
        """Prune this process's share of matrices with the same inputs."""
        for matrix in matrices:
            if self._owner(matrix) == self._processes.rank:
                self._own[matrix.name] = prune_one(matrix)
        self._pending += matrices
        if self._at_once:
            self._exchange()

    def collect(self) -> list[MatrixResult]:
        """Finish pruning all matrices so far; return the results since the last call."""
        self._exchange()
        results, self._results = self._results, []
        return results

    def _exchange(self) -> None:
        if not self._pending:
            return
        known = {name: result for own in self._processes.gather(self._own) for name, result in own.items()}
        self._processes.broadcast([(matrix.stored(), self._owner(matrix)) for matrix in self._pending])
        self._results += [known[matrix.name] for matrix in self._pending]
        self._pending, self._own = [], {}


def share_out(groups: Sequence[Sequence[Matrix]], processes: int, gram: bool) -> dict[str, int]:
    """Assign each matrix to a process so that all end at about the same time: matrix name → rank.

    groups: of matrices fed by the same tensor, which share a statistic and what is derived from it.
    gram: count O·I² for an O × I matrix, plus I³ once for each group that a process has a part of; else O·I.
    """
    loads = [0] * processes
    factored: set[tuple[int, int]] = set()
    owners: dict[str, int] = {}

    def cost(number: int, matrix: Matrix, rank: int) -> int:
        rows, width = matrix.shape
        if not gram:
            return rows * width
        return rows * width**2 + (0 if (number, rank) in factored else width**3)

    jobs = [(number, matrix) for number, group in enumerate(groups) for matrix in group]
    for number, matrix in sorted(jobs, key=lambda job: -job[1].shape[0] * job[1].shape[1] ** 2):
        rank = min(range(processes), key=lambda r: loads[r] + cost(number, matrix, r))
        loads[rank] += cost(number, matrix, rank)
        factored.add((number, rank))
        owners[matrix.name] = rank
    return owners


def prune_walk(
    walk: Iterable[MatricesReady | BlockDone],
    solver: Solver,
    target_of: Callable[[Matrix], Target],
    layer_error: bool = True,
    block_done: Callable[[BlockDone, list[MatrixResult]], list[MatrixResult]] = lambda done, results: results,
    solving: Solving | None = None,
) -> list[MatrixResult]:
    """Prune every matrix of the walk in place.

    Args:
        walk: yields matrices with statistics of their inputs, and finished blocks.
        solver: how to prune them.
        target_of: pattern and sparsity of each matrix.
        layer_error: whether to measure layer errors (on the Gram matrix if there is one, else on the sample of inputs).
        block_done: called with each finished block and its results, which it may amend.
        solving: which process prunes which matrix; by default this one prunes all.

    Returns:
        The results of all blocks and of the matrices after them.

    Raises:
        NumericalError: solving failed; the message names the matrix.
    """
    solving = solving or Solving()
    results: list[MatrixResult] = []

    def prune_one(inputs: Inputs | None, matrix: Matrix) -> MatrixResult:
        return prune_matrix(matrix, inputs, solver, target_of(matrix), layer_error)

    for event in walk:
        if isinstance(event, MatricesReady):
            solving.prune(event.matrices, partial(prune_one, event.inputs))
        else:
            results += block_done(event, solving.collect())
    return results + solving.collect()


def prune_matrix(
    matrix: Matrix, inputs: Inputs | None, solver: Solver, target: Target, layer_error: bool
) -> MatrixResult:
    """Prune one matrix in place and measure the effect on its outputs."""
    started = time.perf_counter()
    weight = matrix.read()
    try:
        # All results are read from the device at once.
        with reading_later() as reading:
            pruned = solver.solve(weight, inputs, target)
            matrix.write(pruned.weight)
            # The error after rounding to the model's dtype.
            after = matrix.read()
            refuse_overflow(matrix, weight, after)
            noted = note(reading, matrix, inputs, weight, after, layer_error)
    except NumericalError as error:
        matrix.write(weight)
        raise error.within(matrix.name) from error
    return MatrixResult(
        name=matrix.name,
        shape=matrix.shape,
        sparsity=noted.zeros / weight.numel(),
        mask_checksum=noted.checksum,
        relative_layer_error=noted.layer_error,
        tokens=None if inputs is None else inputs.sample.count,
        seconds=time.perf_counter() - started,
        events=pruned.events,
        distributions=noted.distributions,
    )


class Noted(NamedTuple):
    """Zeros with their checksum, the layer error if measured, and distributions of weights and inputs."""

    zeros: int
    checksum: str
    layer_error: float | None
    distributions: Distributions


def note(
    reading: Reading, matrix: Matrix, inputs: Inputs | None, weight: Tensor, after: Tensor, layer_error: bool
) -> Noted:
    """Measure a pruned matrix with a single read from the device.

    Args:
        reading: holds the solver's deferred checks.
        matrix: as the model now holds it.
        inputs: statistics of its inputs.
        weight: before pruning, O × I.
        after: the weight now, O × I.
        layer_error: whether to measure it.

    Raises:
        NumericalError: raised by the solver's deferred checks.
    """
    stored = matrix.stored()
    # First, while nothing else is held, since it takes most memory.
    errors = _squared_errors(inputs, weight, after) if layer_error and inputs is not None else None
    magnitude, kept = sampled(weight, (stored if matrix.input_dim == 1 else stored.T) != 0)
    norm = None if inputs is None else _norm(inputs)
    read = reading.read(mask_bits(stored), torch.count_nonzero(stored), magnitude, kept, norm, errors)
    bits, count, magnitude, kept = (tensor for tensor in read[:4] if tensor is not None)
    norm, errors = read[4:]
    return Noted(
        stored.numel() - int(count),
        checksum_of(bits),
        None if errors is None else ratio_of(errors),
        distributions_in_host_memory(magnitude, kept, norm),
    )


def refuse_overflow(matrix: Matrix, weight: Tensor, after: Tensor) -> None:
    """Raise NumericalError if finite weights became too large for the model's dtype.

    Args:
        matrix: as the model now holds it.
        weight: before pruning, O × I.
        after: the weight now, O × I.
    """
    if matrix.stored().dtype == torch.float16:  # all other dtypes reach as far as float32, used for solving
        error = NumericalError("pruned weights are too large for float16", fix=("try ", Set("dtype", "bfloat16")))
        refuse_if(torch.isfinite(weight).all() & ~torch.isfinite(after).all(), error)


def _norm(inputs: Inputs) -> Tensor | None:
    """Return the root mean square of every input channel (I float32), from the sample if there is no statistic."""
    if inputs.sample.count == 0:
        return None
    if inputs.statistic is not None:
        return inputs.statistic.root_mean_square
    return inputs.sample.inputs.square().mean(dim=0).sqrt()


def _squared_errors(inputs: Inputs, weight: Tensor, after: Tensor) -> Tensor | None:
    if inputs.sample.count == 0:
        return None
    statistic = inputs.statistic
    known = inputs.sample if statistic is None or not statistic.computes_errors else statistic
    return known.squared_errors(weight, after)
