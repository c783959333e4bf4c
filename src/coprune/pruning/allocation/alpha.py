"""AlphaPruning: blocks whose weight spectra have heavier tails are better trained and pruned less (arXiv 2410.10912)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.options import require_not_negative
from coprune.pruning.allocation.base import Shown, Unit
from coprune.pruning.allocation.budget import wish, within_budget
from coprune.recipe.pattern import Target


@dataclass(frozen=True)
class Alpha:
    """Give every block a sparsity that grows with the tail exponent of its matrices; needs no data.

    Paper: AlphaPruning, arXiv 2410.10912.
    """

    epsilon: float = 0.3
    """Sparsities lie between 1 − ε and 1 + ε times the overall one, before they are scaled to the exact budget."""

    looks: ClassVar[bool] = True
    asks_movement: ClassVar[bool] = False
    statistic: ClassVar[None] = None
    first: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require_not_negative(epsilon=self.epsilon)
        if self.epsilon > 1:
            raise BadInput(
                f"option 'epsilon' must be at most 1, not {self.epsilon!r}", field="epsilon", value=self.epsilon
            )

    def measure(self, shown: Sequence[Shown], moved: float, target: Target) -> dict[str, Tensor]:
        return {
            matrix.name: torch.tensor([tail_exponent(matrix.read()), 1.0], dtype=torch.float64) for matrix, _ in shown
        }

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        found: dict[str, Tensor] = {}
        for unit in units:
            own = sums.get(unit.name, torch.zeros(2, dtype=torch.float64))
            found[unit.place] = found.get(unit.place, torch.zeros(2, dtype=torch.float64)) + own
        exponents = torch.stack([found[unit.place][0] / found[unit.place][1].clamp_min(1) for unit in units])
        counts = torch.tensor([unit.weights for unit in units], dtype=torch.float64)
        sparsities = sparsities_by_exponent(exponents, counts, target.sparsity, self.epsilon)
        wishes = [wish(float(sparsity), unit) for sparsity, unit in zip(sparsities, units, strict=True)]
        return within_budget(units, wishes, target)


def tail_exponent(weight: Tensor) -> float:
    """Hill's estimate of the power law that the larger half of the squared singular values follows.

    1 + k / Σ ln(λ_i / λ_k'), over the k = n − ⌊n/2⌋ largest of n, λ_k' the smallest of those, in float64; values that are
    zero up to rounding do not count. A spectrum without any spread has no tail: infinity is bounded to 1 + k · 1e6.

    Args:
        weight: O × I float.
    """
    exact = weight.double()
    small = exact @ exact.T if exact.shape[0] <= exact.shape[1] else exact.T @ exact
    values = torch.linalg.eigvalsh(small)
    values = values[values > 1e-12 * values[-1].clamp_min(1e-300)]
    if len(values) == 0:
        return 1.0
    tail = values[len(values) // 2 :].log()
    total = float((tail - tail[0]).sum())
    return 1 + len(tail) / max(total, 1e-6)


def sparsities_by_exponent(exponents: Tensor, counts: Tensor, sparsity: float, epsilon: float) -> Tensor:
    """Map tail exponents linearly to sparsities, scaled so that their mean is the asked one.

    What the scaling would lift above all weights stays at all of them, and the others take the rest.

    Args:
        exponents: float64, one per unit.
        counts: float64, the units' weights.
        sparsity: the overall one.
        epsilon: relative sparsities lie between 1 − ε and 1 + ε before they are scaled.

    Returns:
        Float64 in [0, 1], one per unit.
    """
    distance = exponents.max() - exponents.min()
    if float(distance) == 0:
        return torch.full_like(exponents, sparsity)
    relative = 1 - epsilon + 2 * epsilon * (exponents - exponents.min()) / distance
    low, high = 0.0, 1.0
    while mean_of((high * relative).clamp(max=1), counts) < sparsity:
        high *= 2
        if high > 1e9:  # too many units of relative sparsity zero
            break
    for _ in range(100):
        scale = (low + high) / 2
        if mean_of((scale * relative).clamp(max=1), counts) < sparsity:
            low = scale
        else:
            high = scale
    return (high * relative).clamp(max=1)


def mean_of(values: Tensor, counts: Tensor) -> float:
    """Mean weighted by counts."""
    return float((values * counts).sum() / counts.sum())
