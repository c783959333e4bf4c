"""What pruning a matrix costs: random matrices are pruned at growing sizes until that gets slow.

What larger ones cost follows from how the time grew. It is processor time (see `clock`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from coprune.model.low_rank import wrap
from coprune.model.matrices import Matrix
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.pruning.pruner import Solver, prune_matrix
from coprune.recipe.pattern import Target
from coprune.run.estimate.block import LiveBytes, Shape, seconds_of_call

WORKSPACE = 16 << 20
"""What the linear algebra library takes once for factorisations, measured; no tensor of it is seen."""
SHORT = 0.05
"""Seconds below which a measurement is repeated."""


@dataclass(frozen=True)
class SolveCosts:
    """What pruning one matrix of a shape costs, and gathering its statistic."""

    seconds: float
    seconds_again: float
    """For a second matrix of the same group, which finds the statistic's factor made."""
    most_bytes: float
    statistic_bytes: int
    """Of the sums that are gathered for its group."""
    statistic_seconds_per_token: float


@dataclass(frozen=True)
class Trials:
    """How random matrices are pruned to see what that costs."""

    solver: Solver
    target: Target
    layer_error: bool
    device: torch.device


def measure_solving(shape: Shape, trials: Trials, budget: float) -> SolveCosts:
    """Prune random matrices of a shape's proportions, ever larger ones until that takes more than `budget` seconds."""
    solver, device = trials.solver, trials.device

    def trial(width: int) -> _Trial:
        return _Trial(max(1, round(shape[0] * width / shape[1])), width, trials)

    widths = _widths(shape[1], trials.target)
    points: list[tuple[int, float, float]] = []
    for width in widths:
        # The smallest of three, where they are so short that a moment's work of others would change them.
        times: list[tuple[float, float]] = []
        while not times or (len(times) < 3 and times[0][0] < SHORT):
            one = trial(width)
            times.append((seconds_of_call(one.prune, device, once=True), seconds_of_call(one.prune, device, once=True)))
        points.append((width, min(first for first, _ in times), min(again for _, again in times)))
        # The next takes four to eight times as long. Three sizes show how the time grows.
        if len(points) > 2 and points[-1][1] > budget / 6:
            break
    statistic = solver.statistic
    sums = {} if statistic is None else statistic.shapes(shape[1])
    growth = 2 if any(len(size) == 2 for size in sums.values()) else 1
    return SolveCosts(
        seconds=_extrapolate([(w, t) for w, t, _ in points], shape[1]),
        seconds_again=_extrapolate([(w, t) for w, _, t in points], shape[1]),
        most_bytes=_most_bytes([(w, trial(w)) for w in widths[:2]], shape[1]) + (WORKSPACE if growth == 2 else 0),
        statistic_bytes=4 * sum(math.prod(size) for size in sums.values()) + 4 * InputSample.tokens * shape[1],
        statistic_seconds_per_token=one.gathering_seconds * (shape[1] / points[-1][0]) ** growth,
    )


def _most_bytes(trials: Sequence[tuple[int, _Trial]], width: int) -> float:
    """What lives at most at a width, from smaller ones: a + b·w², since some tables have one size for all."""
    points = []
    for trial_width, trial in trials:
        live = LiveBytes()
        with live:
            trial.prune()
        points.append((trial_width**2, live.most))
    (x1, y1), (x2, y2) = points[0], points[-1]
    slope = (y2 - y1) / (x2 - x1) if x2 > x1 else 0.0
    return y2 + slope * (width**2 - x2)


class _Trial:
    """A random matrix with random inputs, to be pruned."""

    tokens = 256

    def __init__(self, rows: int, width: int, trials: Trials) -> None:
        solver, device = trials.solver, trials.device
        generator = torch.Generator().manual_seed(0)
        module = nn.Linear(width, rows, bias=False, device="meta")
        module.weight = nn.Parameter(torch.randn(rows, width, generator=generator).to(device), requires_grad=False)
        self._matrix = Matrix("trial", module, "weight", input_dim=1)
        if solver.low_rank is not None:
            wrap(self._matrix)
        self._arguments = (solver, trials.target, trials.layer_error)
        self._inputs = Inputs(
            None if solver.statistic is None else solver.statistic(width, device), InputSample(width, 1)
        )
        x = torch.randn(self.tokens, width, generator=generator).to(device)
        self._inputs.update(x)
        again = seconds_of_call(lambda: self._inputs.update(x), device, once=True)
        self.gathering_seconds = again / self.tokens
        # As many tokens as there are inputs, without the time that they would take.
        if self._inputs.statistic is not None:
            seen = self._inputs.statistic
            seen.restore(seen.sums, max(width, seen.count))

    def prune(self) -> None:
        prune_matrix(self._matrix, self._inputs, *self._arguments)


def _widths(width: int, target: Target) -> Sequence[int]:
    """128, 256 … up to the width itself, in multiples that the pattern divides; none of less than one group."""
    multiple = target.multiple
    smaller = [128 << i for i in range(20) if 128 << i < width]
    return [*(size - size % multiple for size in smaller if size >= multiple), width]


def _extrapolate(points: Sequence[tuple[float, float]], width: int) -> float:
    """The time at a width, from times at smaller ones: a·w² + b·w³ through the last two."""
    w2, t2 = points[-1]
    if w2 == width:
        return t2
    w1, t1 = points[-2]
    cubic = min(max(0.0, (t2 / w2**2 - t1 / w1**2) / (w2 - w1)), t2 / w2**3)
    square = t2 / w2**2 - cubic * w2
    return square * width**2 + cubic * width**3
