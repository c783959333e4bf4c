"""Error-driven allocation: measure what every matrix loses at several sparsities, and spend zeros where least is lost.

The errors are those of Wanda's mask, relative to the matrix's own output, so that those of different matrices compare,
and times what the matrix's block changes in the hidden states, since what a block hardly adds to can hardly be spoilt by
it. Their sum is least, under one budget, where every matrix loses the same for its last weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coprune.base.options import require_not_negative, require_positive
from coprune.base.precision import full_float32, total
from coprune.model.walk.statistics import Gram
from coprune.pruning.allocation.base import Shown, Unit
from coprune.pruning.allocation.curves import grid_around, require_points, spend_where_least_is_lost
from coprune.pruning.masked_fit import Rounds, damp_diagonal, solve_masked
from coprune.pruning.methods.base import apply_keep
from coprune.pruning.methods.wanda import wanda_score
from coprune.recipe.pattern import Target


@dataclass(frozen=True)
class ByError:
    """Minimise the relative layer errors of all matrices, summed with the weights of their blocks."""

    bound: float = 0.15
    """How far a matrix's sparsity may be from the overall one (N:M: at least one of M)."""
    points: int = 7
    """At how many sparsities errors are measured (N:M: at every N within the bound)."""
    rows: int = 256
    """Outputs of a matrix to measure on, evenly spaced: its error is a sum over them."""
    refit: int = 0
    """Rounds of masked refit before an error is measured, for methods that update weights."""
    movement: float = 1.0
    """Errors count by what their block changes in the hidden states, to this power; 0: all blocks alike."""
    first: int = 0
    """How many calibration tokens to look at, the first ones, in whole batches; 0: all."""

    looks: ClassVar[bool] = True
    asks_movement: ClassVar[bool] = True
    statistic: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        require_positive(bound=self.bound, rows=self.rows)
        require_not_negative(refit=self.refit, movement=self.movement, first=self.first)
        require_points(self.points)

    def measure(self, shown: Sequence[Shown], moved: float, target: Target) -> dict[str, Tensor]:
        """For every matrix the size of its output, and its weighted errors at the sparsities of `grid`."""
        found = {}
        for matrix, statistic in shown:
            if isinstance(statistic, Gram):
                weight = matrix.read()
                rows = weight[:: -(-weight.shape[0] // self.rows)]
                found[matrix.name] = layer_errors(rows, statistic, self.grid(target), self.refit)
                found[matrix.name][1:] *= moved**self.movement
        return found

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        # Of a matrix that no token came to, or whose output is zero, nothing is known to be lost.
        lost = {name: found[1:] / found[0] for name, found in sums.items() if float(found[0]) > 0}
        return spend_where_least_is_lost(units, lost, self.grid(target), target)

    def grid(self, target: Target) -> list[Target]:
        """The targets at which errors are measured, from the lowest sparsity on."""
        return grid_around(target, self.bound, self.points)


def layer_errors(weight: Tensor, statistic: Gram, grid: Sequence[Target], refit: int) -> Tensor:
    """Size of a layer's output and its errors ‖X(W − Ŵ)ᵀ‖²/T under Wanda's masks, refitted for some rounds.

    Args:
        weight: O × I float32.
        statistic: of its inputs.
        grid: the targets to measure at.
        refit: rounds of conjugate gradients.

    Returns:
        Float64: the size, then one error per target.
    """
    with full_float32():
        gram = statistic.gram
        damped = damp_diagonal(gram, 0.01)
        score = wanda_score(weight, statistic)
        found = [_energy(weight, gram)]
        for target in grid:
            keep = target.keep(score, "row")
            pruned = apply_keep(weight, keep)
            if refit:
                pruned = solve_masked(weight, pruned, keep, damped, Rounds(refit))
            found.append(_energy(weight - pruned, gram))
    return torch.stack(found).cpu()


def _energy(weight: Tensor, gram: Tensor) -> Tensor:
    return total((weight @ gram) * weight)
