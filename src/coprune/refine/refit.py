"""Masked refit: the best values for the weights that a mask has left, by conjugate gradients on all rows at once.

Every row is a least-squares problem of its own (its kept inputs), but all share one Gram matrix, so one product per
round serves them all. This is the last step of ALPS (arXiv 2406.07831) made available to any mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coprune.linear_algebra import full_float32, solve_masked
from coprune.methods.base import Pruned
from coprune.options import require_positive
from coprune.patterns import Target
from coprune.statistics import Gram


@dataclass(frozen=True)
class Refit:
    """Solve for the kept weights; the mask stays."""

    rounds: int = 20
    """Rounds of conjugate gradients."""

    statistic: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        require_positive(rounds=self.rounds)

    def refine(self, weight: Tensor, pruned: Pruned, statistic: Gram, target: Target) -> Pruned:
        with full_float32():
            solved = solve_masked(weight.to(torch.float32), pruned.weight, pruned.keep, statistic.gram, self.rounds)
        return pruned._replace(weight=solved)
