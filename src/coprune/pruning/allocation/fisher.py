"""Allocation by the Fisher information: what the model's own distributions lose, to second order, and zeros where it is least.

With labels y drawn from the model's own distribution, half the mean of ⟨ΔW, ∇ log p(y)⟩² is, to second order, the divergence
KL(before ‖ after) that a change ΔW of a matrix makes. So the losses of all matrices have one unit, nats, whatever lies between a
matrix and the logits: nothing has to be said of how much its block counts. Here ΔW is what Wanda's mask takes. A matrix's rows
are counted as independent of each other, and its loss is a sum over a part of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coprune.base.options import require_not_negative, require_positive
from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.pruning.allocation.base import Shown, Unit
from coprune.pruning.allocation.curves import grid_around, require_points, spend_where_least_is_lost
from coprune.pruning.methods.wanda import score_by_norms
from coprune.recipe.pattern import Target

_MOST_APART = 256.0
"""Of a few samples, some outputs see next to no gradient; more than so much is not believed."""
_ROWS_AT_A_TIME = 64
"""Distributions that are drawn from at a time, each of which is as long as the vocabulary."""


@dataclass(frozen=True)
class ByFisher:
    """Minimise the divergence from the dense model's distributions, to second order, summed over the matrices.

    Paper: Fisher pruning, arXiv 1801.05787, whose gradients these are; here they price sparsities instead of weights.
    """

    bound: float = 0.2
    """How far a matrix's sparsity may be from the overall one (N:M: at least one of M)."""
    points: int = 7
    """At how many sparsities losses are measured (N:M: at every N within the bound)."""
    rows: int = 256
    """Outputs of a matrix to measure on, evenly spaced: its loss is a sum over them."""
    first: int = 2048
    """How many calibration tokens to look at, the first ones, in whole batches; 0: all."""
    outputs: float = 0.5
    """How much masks that leave open how many zeros a row has are chosen by what errors in each output cost, too: the power of
    that; 0: not at all."""

    looks: ClassVar[bool] = True
    statistic: ClassVar[type[Statistic]] = InputNorm

    def __post_init__(self) -> None:
        require_positive(bound=self.bound, rows=self.rows)
        require_not_negative(first=self.first, outputs=self.outputs)
        require_points(self.points)

    def measure(self, shown: Sequence[Shown], target: Target) -> dict[str, Tensor]:
        """Sums of squares of every matrix's inputs, of which masks are made; those of experts are added up."""
        return {
            matrix.name: statistic.count * statistic.root_mean_square.double().square()
            for matrix, statistic in shown
            if statistic is not None
        }

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        """As in `Allocation`. sums: what each unit loses at the targets of the grid."""
        return spend_where_least_is_lost(units, sums, self.grid(target), target)

    def grid(self, target: Target) -> list[Target]:
        """The targets at which losses are measured, from the lowest sparsity on."""
        return grid_around(target, self.bound, self.points)

    def tells_outputs(self, target: Target) -> bool:
        """Whether it says by how much a matrix's outputs count."""
        return self.outputs > 0 and target.pattern.n_of_m is None

    def step(self, outputs: int, experts: int) -> int:
        """Of how many rows of a matrix one is measured on. experts: matrices that the rows are shared among."""
        return max(1, outputs * experts // self.rows)


def goes_at(rows: Tensor, squares: Tensor, grid: Sequence[Target]) -> Tensor:
    """At which target of a grid each weight is first taken by Wanda's mask.

    Args:
        rows: R × I float32, weights.
        squares: I, sums of squares of the inputs.
        grid: ascending, so that what one takes the next one takes too.

    Returns:
        R × I int64: a number of the grid; its length where none takes the weight.
    """
    score = score_by_norms(rows, squares.sqrt().to(rows))
    return torch.stack([target.keep(score, "row") for target in grid]).sum(dim=0)


def shares_of_outputs(squares: Tensor, power: float) -> Tensor:
    """By how much an error in each output counts, 1 being the mean.

    Args:
        squares: O float64, sums of squares of the gradients by a row's weights, which are those by its output times the inputs.
        power: of that. To second order it is 1, but so many zeros are no small change, and rows that count most then keep
            more than is good for the others.

    Returns:
        O float32, of squares no less and no more than a factor of 256 from their mean; all 1 where there are no gradients.
    """
    mean = squares.mean()
    shares = squares / mean if float(mean) > 0 else torch.ones_like(squares)
    shares = shares.clamp(1 / _MOST_APART, _MOST_APART) ** power
    return (shares / shares.mean()).float()


def squared_changes(rows: Tensor, slopes: Tensor, goes: Tensor, points: int) -> Tensor:
    """Σ over rows of ⟨ΔW, ∇⟩² at every target, where ΔW is the weights that it takes.

    Args:
        rows: R × I float32, weights.
        slopes: R × I float32, the gradient of the log probability of what was drawn.
        goes: R × I int64, as `goes_at` gives it.
        points: targets of the grid.

    Returns:
        P float64.
    """
    changes = rows.new_zeros(len(rows), points + 1).scatter_add_(1, goes, rows * slopes)
    return changes.double().cumsum(dim=1)[:, :points].square().sum(dim=0)


@torch.no_grad()
def drawn_slopes(logits: Tensor, seed: int) -> Tensor:
    """The gradient of −log p(y) by the logits, for one y drawn from each row's own distribution p: p less one at y.

    Args:
        logits: N × V.
        seed: of what is drawn, the same on every device.

    Returns:
        N × V, of the same dtype.
    """
    slopes = torch.empty_like(logits)
    levels = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(seed)).to(logits.device)
    parts = (whole.split(_ROWS_AT_A_TIME) for whole in (logits, levels, slopes))
    for own, level, into in zip(*parts, strict=True):
        p = own.float().softmax(dim=-1)
        sums = p.cumsum(dim=-1)
        drawn = torch.searchsorted(sums, level * sums[:, -1:], right=True).clamp_max(p.shape[1] - 1)
        into.copy_(p.scatter_add_(1, drawn, torch.full_like(level, -1.0)))
    return slopes
