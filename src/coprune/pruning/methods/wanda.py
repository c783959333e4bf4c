"""Wanda: weight magnitude times input norm, compared within each output row (arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.pruning.linear_algebra import unless_all_zero
from coprune.pruning.methods.base import Pruned, apply_keep
from coprune.recipe.pattern import Group, Target


def wanda_score(weight: Tensor, statistic: Statistic) -> Tensor:
    """Return |W_ij| · n_j, where n_j is the root mean square of input channel j (|W_ij| if all inputs were zero).

    Args:
        weight: O × I float32.
        statistic: of its inputs.

    Returns:
        O × I float32.
    """
    return score_by_norms(weight, statistic.root_mean_square)


def score_by_norms(weight: Tensor, norms: Tensor) -> Tensor:
    """Compute `wanda_score` from the norms of the input channels (I float32), in any unit."""
    return weight.abs() * unless_all_zero(norms)


@dataclass(frozen=True)
class Wanda:
    """Prune the weights with the smallest |W| · n; no weight changes.

    Paper: arXiv 2306.11695.
    """

    group: Group = "row"
    """Weights that compete: those of one output row (the paper's choice) or the whole matrix."""

    statistic: ClassVar[type[Statistic]] = InputNorm

    def prune(self, weight: Tensor, statistic: Statistic, target: Target) -> Pruned:
        keep = target.keep(wanda_score(weight, statistic), self.group)
        return Pruned(apply_keep(weight, keep), keep)
