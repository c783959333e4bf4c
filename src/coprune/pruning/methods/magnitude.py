"""Magnitude: the smallest weights are pruned, whatever their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coprune.pruning.methods.base import Pruned, apply_keep
from coprune.recipe.pattern import Group, Target


@dataclass(frozen=True)
class Magnitude:
    """Prune the weights with the smallest |W|; no weight changes and no inputs are needed."""

    group: Group = "matrix"
    """Weights that compete: those of the whole matrix (the usual baseline) or of one output row."""

    statistic: ClassVar[None] = None

    def prune(self, weight: Tensor, statistic: None, target: Target) -> Pruned:
        keep = target.keep(weight.abs(), self.group)
        return Pruned(apply_keep(weight, keep), keep)
