"""RIA: weights are scored by their shares of their row and column (Plug-and-Play, ICLR 2024, OpenReview Tr0lPx9woF).

Magnitude and Wanda can strip an input or output almost bare; relative importance keeps the strongest weights of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coprune.base.method_options import require_not_negative
from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.pruning.linear_algebra import unless_all_zero
from coprune.pruning.methods.base import Pruned, apply_keep
from coprune.recipe.pattern import Group, Target


def ria_score(weight: Tensor, statistic: Statistic, power: float) -> Tensor:
    """Return (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · n_j^power.

    Args:
        weight: O × I float32.
        statistic: of its inputs, whose norms are n_j.
        power: exponent of the norms.

    Returns:
        O × I float32.
    """
    magnitude = weight.abs()
    tiny = 1e-30  # a row or column of zeros scores zero
    by_input = magnitude / magnitude.sum(dim=0, keepdim=True).clamp_min(tiny)
    by_output = magnitude / magnitude.sum(dim=1, keepdim=True).clamp_min(tiny)
    return (by_input + by_output) * unless_all_zero(statistic.root_mean_square).pow(power)


@dataclass(frozen=True)
class RIA:
    """Prune the weights of least relative importance; no weight changes.

    Paper: Plug-and-Play, ICLR 2024, OpenReview Tr0lPx9woF.
    """

    power: float = 0.5
    """Exponent of the input norms: n^power."""
    group: Group = "matrix"
    """Weights that compete: those of the whole matrix (as in the authors' code) or of one output row."""

    statistic: ClassVar[type[Statistic]] = InputNorm

    def __post_init__(self) -> None:
        require_not_negative(power=self.power)

    def prune(self, weight: Tensor, statistic: Statistic, target: Target) -> Pruned:
        keep = target.keep(ria_score(weight, statistic, self.power), self.group)
        return Pruned(apply_keep(weight, keep), keep)
