"""How fast this machine is: costs measured on one block of the model.

A calibration takes a second or two: one block runs on one sample, and every kind of matrix is pruned at growing sizes
until that gets slow; what larger ones cost follows from how the time grew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coprune.base.devices import synchronize
from coprune.evaluation.perplexity import window_nll
from coprune.model.matrices import Matrix
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.observe import Observe, observe_products
from coprune.model.walk.proven import FoundModel
from coprune.model.walk.record import guess_call
from coprune.model.walk.sample import InputSample
from coprune.model.walk.statistics import CrossGram
from coprune.pruning.pruner import Solver, prune_matrix
from coprune.recipe.pattern import Target
from coprune.run.estimate.live_bytes import LiveBytes

Shape = tuple[int, int]
"""(out, in) of a matrix."""
WORKSPACE = 48 << 20
"""What the linear algebra library takes once for factorisations, measured; no tensor of it is seen."""
SHORT = 0.05
"""Seconds below which a measurement is repeated."""


@dataclass(frozen=True)
class BlockCosts:
    """What running the largest block costs."""

    read_seconds: float
    """To make its weights real."""
    weight_bytes: int
    seconds_per_token: float
    bytes_per_token: float
    """Most that lives at once within the block, besides its input."""
    waiting_bytes_per_token: float
    """Most that lives while a matrix waits to be pruned, likewise (`sequential`)."""
    hidden_bytes_per_token: float
    """Of the hidden states between two blocks."""
    tokens_per_sample: int
    groups: tuple[tuple[Shape, ...], ...]
    """Shapes of its matrices; those of one group are fed by the same tensor."""


@torch.no_grad()
def measure_block(model: FoundModel, sample: Tensor) -> BlockCosts:
    """Read the largest block, run it on one sample (1 × S int64 tokens, or pixels), and let go of it."""
    weights, blocks, matrices = model.weights, model.blocks, model.chosen.blocks
    sizes = [sum(p.numel() * p.element_size() for p in block.module.parameters()) for block in blocks]
    block = blocks[max(range(len(blocks)), key=sizes.__getitem__)]
    started = time.perf_counter()
    weights.acquire(block.name)
    read = time.perf_counter() - started
    try:
        hidden, call = guess_call(weights.model, blocks[: block.index + 1], sample)

        def run() -> object:
            return call.run(block.module, hidden)

        _, products = observe_products(matrices[block.index], run)
        live, stops = LiveBytes(), [0]
        with live, Observe(matrices[block.index], lambda matrix, x: stops.append(live.now)):
            run()
        seconds = _seconds(run, hidden.device)
    finally:
        weights.release(block.name)
    tokens = hidden.shape[0] * hidden.shape[1]
    return BlockCosts(
        read_seconds=read,
        weight_bytes=max(sizes),
        seconds_per_token=seconds / tokens,
        bytes_per_token=live.most / tokens,
        waiting_bytes_per_token=max(stops) / tokens,
        hidden_bytes_per_token=hidden.nbytes / tokens,
        tokens_per_sample=hidden.shape[1],
        groups=tuple(
            tuple(matrix.shape for matrix in group)
            for group in [*products.groups, *([matrix] for matrix in products.unseen)]
        ),
    )


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
    cross: bool
    """Whether a cross Gram matrix is gathered."""


def measure_solving(shape: Shape, trials: Trials, budget: float) -> SolveCosts:
    """Prune random matrices of a shape's proportions, ever larger ones until that takes more than `budget` seconds."""
    solver, device, cross = trials.solver, trials.device, trials.cross

    def trial(width: int) -> _Trial:
        return _Trial(max(1, round(shape[0] * width / shape[1])), width, trials)

    widths = _widths(shape[1], trials.target)
    points: list[tuple[int, float, float]] = []
    for width in widths:
        # The smallest of three, where they are so short that a moment's work of others would change them.
        times: list[tuple[float, float]] = []
        while not times or (len(times) < 3 and times[0][0] < SHORT):
            one = trial(width)
            times.append((_seconds(one.prune, device, once=True), _seconds(one.prune, device, once=True)))
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
        statistic_bytes=4 * sum(math.prod(size) for size in sums.values())
        + 4 * InputSample.tokens * shape[1]
        + (4 * shape[1] ** 2 if cross else 0),
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
        solver, device, cross = trials.solver, trials.device, trials.cross
        generator = torch.Generator().manual_seed(0)
        module = nn.Linear(width, rows, bias=False, device="meta")
        module.weight = nn.Parameter(torch.randn(rows, width, generator=generator).to(device), requires_grad=False)
        self._matrix = Matrix("trial", module, "weight", input_dim=1)
        self._arguments = (solver, trials.target, trials.layer_error)
        self._inputs = Inputs(
            None if solver.statistic is None else solver.statistic(width, device), InputSample(width, 1)
        )
        if cross:
            self._inputs.cross = CrossGram(width, device)
        x = torch.randn(self.tokens, width, generator=generator).to(device)
        self._inputs.update(x, x if cross else None)
        started = time.perf_counter()
        self._inputs.update(x, x if cross else None)
        self.gathering_seconds = (time.perf_counter() - started) / self.tokens
        # As many tokens as there are inputs, without the time that they would take.
        if self._inputs.statistic is not None:
            seen = self._inputs.statistic
            seen.restore(seen.sums, max(width, seen.count))

    def prune(self) -> None:
        prune_matrix(self._matrix, self._inputs, *self._arguments)


def _widths(width: int, target: Target) -> Sequence[int]:
    """128, 256 … up to the width itself, in multiples that the pattern divides; none of less than one group."""
    multiple = target.pattern.group_size or 1
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


@torch.no_grad()
def measure_head(model: nn.Module, device: torch.device, tokens: int = 64) -> tuple[float, float]:
    """Seconds and bytes per token of the logits and their likelihood; zeros for a model without a language head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return 0.0, 0.0
    weight = head.weight
    x = torch.ones(1, tokens, weight.shape[1], dtype=weight.dtype, device=device)
    targets = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    seconds = _seconds(lambda: window_nll(head(x), targets), device)
    return seconds / tokens, float(weight.shape[0] * weight.element_size())


def _seconds(run: Callable[[], object], device: torch.device, once: bool = False) -> float:
    """Seconds of a call; the smaller of two, unless it is to be called once only or takes long."""
    times: list[float] = []
    while not times or (not once and len(times) < 2 and times[0] < 0.3):
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
