"""Allocation by Fisher information: zeros where the model's distributions change least, to second order.

With labels y drawn from the model's own distribution, half the mean of ⟨ΔW, ∇ log p(y)⟩² is, to second order, the divergence
KL(before ‖ after) of a change ΔW of a matrix, here by Wanda's mask. So all matrices' losses are in nats and need no weight
per block. Rows are treated as independent, and a matrix's loss is estimated on some of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coprune.base.errors import BadInput, NumericalError, UnsupportedModel
from coprune.base.method_options import require_not_negative, require_positive
from coprune.base.processes import ALONE, Processes
from coprune.model.blocks import Block
from coprune.model.checkpoint.load import task_of
from coprune.model.matrices import Matrix
from coprune.model.matrix_choice import Chosen
from coprune.model.walk.block_calls import forward_logits, replaced_forwards
from coprune.model.walk.model_structure import FoundModel
from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.pruning.allocation.allocation import Curve, Floats, Shown, Unit, unit_name, within_budget
from coprune.pruning.methods.wanda import score_by_norms
from coprune.recipe.pattern import Target

_MOST_APART = 256.0
"""Maximum ratio to the mean: with few samples, some outputs get almost no gradient."""
_ROWS_AT_A_TIME = 64
"""Number of vocabulary-sized distributions sampled at a time."""


@dataclass(frozen=True)
class ByFisher:
    """Minimise the divergence from the dense model's distributions, to second order, summed over the matrices.

    Paper: Fisher pruning, arXiv 1801.05787, with the same gradients, which here score sparsities instead of weights.
    """

    bound: float = 0.2
    """Maximum difference of a matrix's sparsity from the overall one (N:M: at least one of M)."""
    points: int = 7
    """Number of sparsities at which losses are measured (N:M: every N within the bound)."""
    rows: int = 256
    """Number of a matrix's outputs to measure on, evenly spaced."""
    first: int = 2048
    """Number of leading calibration tokens to use, in whole batches; 0: all."""
    outputs: float = 0.5
    """Exponent of the error weights by output, where rows may differ in zeros; 0: all outputs weigh the same."""

    measures: ClassVar[bool] = True
    statistic: ClassVar[type[Statistic]] = InputNorm

    def __post_init__(self) -> None:
        require_positive(bound=self.bound, rows=self.rows)
        require_not_negative(first=self.first, outputs=self.outputs)
        require_points(self.points)

    def measure(self, shown: Sequence[Shown], target: Target) -> dict[str, Tensor]:
        """Return sums of squares of each matrix's inputs, for masks; experts are added up."""
        return {
            matrix.name: statistic.count * statistic.root_mean_square.double().square()
            for matrix, statistic in shown
            if statistic is not None
        }

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        """Allocate as in `Allocation`. sums: each unit's loss at the targets of the grid."""
        return spend_where_least_is_lost(units, sums, self.grid(target), target)

    def grid(self, target: Target) -> list[Target]:
        """Return the targets at which losses are measured, ascending."""
        return grid_around(target, self.bound, self.points)

    def weighs_outputs(self, target: Target) -> bool:
        """Return whether errors are weighted by output."""
        return self.outputs > 0 and target.pattern.n_of_m is None

    def step(self, outputs: int, experts: int) -> int:
        """Return the stride of the measured rows of a matrix. experts: number of matrices that share the rows."""
        return max(1, outputs * experts // self.rows)


def first_removed_at(rows: Tensor, squares: Tensor, grid: Sequence[Target]) -> Tensor:
    """Return, for each weight, the first target of a grid at which Wanda's mask removes it.

    Args:
        rows: R × I float32, weights.
        squares: I, sums of squares of the inputs.
        grid: ascending, so that a removed weight stays removed.

    Returns:
        R × I int64: an index into the grid; its length for weights never removed.
    """
    score = score_by_norms(rows, squares.sqrt().to(rows))
    return torch.stack([target.keep(score, "row") for target in grid]).sum(dim=0)


def shares_of_outputs(squares: Tensor, power: float) -> Tensor:
    """Return the weight of errors in each output, with mean 1.

    Args:
        squares: O float64, sum over each row's weights of squared gradients (the output's gradient times the inputs).
        power: exponent. The second order gives 1, but pruning is not a small change, so rows with the largest weights would
            keep too much at the cost of others.

    Returns:
        O float32, from squares clipped to within a factor of 256 of their mean; all 1 if there are no gradients.
    """
    mean = squares.mean()
    shares = squares / mean if float(mean) > 0 else torch.ones_like(squares)
    shares = shares.clamp(1 / _MOST_APART, _MOST_APART) ** power
    return (shares / shares.mean()).float()


def squared_changes(rows: Tensor, gradients: Tensor, removed_at: Tensor, points: int) -> Tensor:
    """Return Σ over rows of ⟨ΔW, ∇⟩² at each target, where ΔW is the removed weights.

    Args:
        rows: R × I float32, weights.
        gradients: R × I float32, the gradient of the log probability of the sampled tokens.
        removed_at: R × I int64, from `first_removed_at`.
        points: number of targets in the grid.

    Returns:
        P float64.
    """
    changes = rows.new_zeros(len(rows), points + 1).scatter_add_(1, removed_at, rows * gradients)
    return changes.double().cumsum(dim=1)[:, :points].square().sum(dim=0)


@torch.no_grad()
def sampled_gradients(logits: Tensor, seed: int) -> Tensor:
    """Return the gradient of −log p(y) by the logits, for one y sampled from each row's distribution p: p, less one at y.

    Args:
        logits: N × V.
        seed: seed of the draw, which is the same on every device.

    Returns:
        N × V, of the same dtype.
    """
    gradients = torch.empty_like(logits)
    levels = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(seed)).to(logits.device)
    parts = (whole.split(_ROWS_AT_A_TIME) for whole in (logits, levels, gradients))
    for own, level, into in zip(*parts, strict=True):
        p = own.float().softmax(dim=-1)
        sums = p.cumsum(dim=-1)
        drawn = torch.searchsorted(sums, level * sums[:, -1:], right=True).clamp_max(p.shape[1] - 1)
        into.copy_(p.scatter_add_(1, drawn, torch.full_like(level, -1.0)))
    return gradients


@dataclass(frozen=True)
class Watched:
    """A matrix whose gradient is processed and freed as soon as it is computed."""

    matrix: Matrix
    step: int
    """Stride of the measured rows."""
    removed_at: Tensor
    """Grid index at which each weight is removed, as bytes."""
    lost: Tensor
    """Summed losses by target, float64."""
    by_row: Tensor | None
    """Sums of squares of each row's gradient, float64; None unless requested."""

    @classmethod
    def of(cls, matrix: Matrix, step: int, squares: Tensor, grid: Sequence[Target], outputs: bool) -> Watched:
        rows = matrix.view()[::step].float()
        removed_at = first_removed_at(rows, squares.to(rows.device), grid).to(torch.uint8)
        lost = torch.zeros(len(grid), dtype=torch.float64, device=rows.device)
        return cls(matrix, step, removed_at, lost, lost.new_zeros(matrix.shape[0]) if outputs else None)

    def look(self) -> None:
        """Add one sample's gradient to the sums."""
        everything = self.matrix.gradient()
        if self.by_row is not None:
            self.by_row.add_(everything.float().square().sum(dim=1))
        rows, gradients = self.matrix.view()[:: self.step].float(), everything[:: self.step].float()
        changes = squared_changes(rows, gradients, self.removed_at.long(), len(self.lost))
        self.lost.add_(changes, alpha=self.matrix.shape[0] / (2 * len(rows)))


Sample = tuple[Tensor, Tensor | None]
"""A batch of one sample, and the mask of its counted tokens (1 × S bool; None for all)."""


def watch(allocation: ByFisher, chosen: Chosen, squares: Mapping[str, Tensor], target: Target) -> list[Watched]:
    """Choose the matrices and rows to watch.

    Args:
        allocation: decides the targets and rows.
        chosen: the matrices.
        squares: sums of squares of the inputs, by name of unit; matrices without an entry are left out.
        target: the overall target.
    """
    grid, outputs, matrices = allocation.grid(target), allocation.weighs_outputs(target), list(chosen.all())
    units = [unit_name(matrix.name) for matrix in matrices]
    experts = Counter(units)
    return [
        Watched.of(matrix, allocation.step(matrix.shape[0], experts[unit]), squares[unit], grid, outputs)
        for matrix, unit in zip(matrices, units, strict=True)
        if unit in squares
    ]


def losses_by_gradients(
    model: FoundModel,
    watched: Sequence[Watched],
    samples: Sequence[Sample],
    processes: Processes = ALONE,
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, Tensor]:
    """Measure each unit's loss at its watched targets, in nats, over all samples.

    Blocks are recomputed in the backward pass, so only one at a time holds activations for gradients.

    Args:
        model: the dense model, in memory.
        watched: the watched matrices.
        samples: those of this process.
        processes: all that measure the model together.
        advance: called with the share of the work just done.

    Returns:
        Float64, by name of unit.

    Raises:
        UnsupportedModel: the model has no gradients.
        NumericalError: they are not finite.
    """
    # Seeded per sample, so that draws do not depend on the process.
    before = sum(processes.gather(len(samples))[: processes.rank])
    with _looking(watched), replaced_forwards(model.blocks, _run_again):
        for seed, sample in enumerate(samples, before):
            _run_backwards(model, sample, seed)
            advance(1 / len(samples))
    return _added_up(watched, processes)


def sampled_noise(vectors: Tensor, seed: int) -> Tensor:
    """Sample as `sampled_gradients`, for rows that are vectors rather than logits: from a normal distribution of variance 1."""
    drawn = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device=vectors.device, dtype=vectors.dtype)


def output_weights(watched: Sequence[Watched], power: float) -> dict[str, Tensor]:
    """Return the weights of errors in each output by name of matrix, after `losses_by_gradients`; empty unless requested.

    power: as in `shares_of_outputs`.
    """
    return {one.matrix.name: shares_of_outputs(one.by_row, power).cpu() for one in watched if one.by_row is not None}


def _run_backwards(model: FoundModel, sample: Sample, seed: int) -> None:
    """Compute the gradients of watched parameters; logits are freed before the next sample."""
    tokens, counted = sample
    logits = forward_logits(model.module, tokens).flatten(0, -2)
    if not logits.requires_grad:
        raise UnsupportedModel("the model's logits have no gradients, which allocation fisher needs")
    vectors = task_of(model.module.config, type(model.module)) == "embeddings"
    gradients = sampled_noise(logits, seed) if vectors else sampled_gradients(logits, seed)
    if counted is not None:
        gradients *= counted.to(gradients.device).flatten()[:, None]
    logits.backward(gradients)


@contextmanager
def _looking(watched: Sequence[Watched]) -> Iterator[None]:
    """Process and free each gradient as soon as it is computed, within the body."""
    parameters: dict[nn.Parameter, list[Watched]] = {}
    for one in watched:
        parameters.setdefault(getattr(one.matrix.owner, one.matrix.attribute), []).append(one)

    @torch.no_grad()
    def look(parameter: nn.Parameter) -> None:
        for one in parameters[parameter]:
            one.look()
        parameter.grad = None

    with ExitStack() as stack, torch.enable_grad():
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            handle = parameter.requires_grad_(True).register_post_accumulate_grad_hook(look)
            stack.callback(handle.remove)
        yield


def _run_again(block: Block) -> Callable[..., Any]:
    """Return a block's forward that keeps only its inputs and is recomputed for gradients."""
    return partial(checkpoint, block.module.forward, use_reentrant=False, preserve_rng_state=False)


def _added_up(watched: Sequence[Watched], processes: Processes) -> dict[str, Tensor]:
    """Add up the losses of all processes, by name of unit."""
    processes.add_up([sums for one in watched for sums in (one.lost, one.by_row) if sums is not None], 0)
    found: dict[str, Tensor] = {}
    for one in watched:
        name, lost = unit_name(one.matrix.name), one.lost.cpu()
        found[name] = found[name] + lost if name in found else lost
    for name, lost in found.items():
        if not lost.isfinite().all():
            raise NumericalError(f"the gradients of {name} are not finite")
    return found


def require_points(points: int) -> None:
    """Raise BadInput for fewer than two points."""
    if points < 2:
        raise BadInput(f"option 'points' must be at least 2, not {points!r}", field="points", value=points)


def grid_around(target: Target, bound: float, points: int) -> list[Target]:
    """Return targets around the overall one, ascending.

    Args:
        target: the overall target.
        bound: maximum distance of a sparsity from it (N:M: at least one of M).
        points: number of targets (N:M: every N within the bound).
    """
    near = target.pattern.sparsities_near(target.sparsity, bound, points)
    return [target.with_sparsity(sparsity) for sparsity in near]


def spend_where_least_is_lost(
    units: Sequence[Unit], lost: Mapping[str, Tensor], grid: Sequence[Target], target: Target
) -> list[Target]:
    """Allocate a target to each unit, minimising the summed loss at the overall sparsity.

    Args:
        units: all units to prune.
        lost: loss of each unit, by name, at each target of the grid (float64, in host memory); a missing unit loses nothing.
        grid: ascending.
        target: the overall target.

    Raises:
        BadInput: the overall sparsity cannot be reached.
    """
    sparsities = np.array([point.sparsity for point in grid])
    none = np.zeros_like(sparsities)
    curves = [convex_curve(sparsities, lost[unit.name].numpy() if unit.name in lost else none) for unit in units]
    return within_budget(units, curves, target)


def convex_curve(sparsities: Floats, errors: Floats) -> Curve:
    """Return the largest convex function below the measured points, linear between its corners.

    Args:
        sparsities: ascending.
        errors: one for each.
    """
    corners: list[int] = []
    for i in range(len(sparsities)):
        while len(corners) > 1 and _above(corners[-2], corners[-1], i, sparsities, errors):
            corners.pop()
        corners.append(i)
    x, y = sparsities[corners], errors[corners]

    def cost(s: Floats) -> Floats:
        # Extrapolated linearly, since whole steps may overshoot the ends by less than one.
        inside = np.interp(s, x, y)
        if len(x) < 2:
            return inside
        first, last = (y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
        result: Floats = inside + first * np.minimum(s - x[0], 0) + last * np.maximum(s - x[-1], 0)
        return result

    return Curve(cost, float(sparsities[0]), float(sparsities[-1]))


def _above(a: int, b: int, c: int, x: Floats, y: Floats) -> bool:
    """Return whether the point b lies on or above the line from a to c."""
    return bool((y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a]))
