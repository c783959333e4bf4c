"""Masked refit: the best values for a mask's kept weights, by conjugate gradients on all rows at once.

Each row is a least-squares problem of its own, but all share one Gram matrix, so one product per round serves them all.
This is the last step of ALPS (arXiv 2406.07831) for any mask. Damping pulls toward the dense weights; without it, a matrix
with fewer tokens than inputs (an expert) would be fitted to their noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coprune.base.method_options import require_not_negative, require_positive
from coprune.base.precision import full_float32, precision_on
from coprune.model.walk.statistics import Gram
from coprune.pruning.masked_fit import Rounds, damp_diagonal, rows_improved, solve_masked
from coprune.pruning.methods.base import Pruned
from coprune.recipe.pattern import Target


@dataclass(frozen=True)
class Refit:
    """Solve for the kept weights of an unchanged mask.

    Paper: the last step of ALPS, arXiv 2406.07831.
    """

    rounds: int = 20
    """Maximum number of conjugate-gradient rounds."""
    tolerance: float = 0.002
    """Stop after the first round that lowers the matrix's error by less than this share of it; 0 runs them all."""
    products: Literal["float32", "bfloat16"] = "float32"
    """Precision of the products with the Gram matrix in a round; float32 where bfloat16 would be slower."""
    damping: float = 0.01
    """Added to each diagonal entry of the Gram matrix, as a fraction of it."""

    def __post_init__(self) -> None:
        require_positive(rounds=self.rounds)
        require_not_negative(damping=self.damping, tolerance=self.tolerance)

    def refine(self, weight: Tensor, pruned: Pruned, statistic: Gram, target: Target) -> Pruned:
        with full_float32():
            dense, gram = weight.to(torch.float32), statistic.gram
            damped = damp_diagonal(gram, self.damping)
            rounds = Rounds(self.rounds, self.tolerance, precision_on(gram.device, self.products))
            solved = solve_masked(dense, pruned.weight, pruned.keep, damped, rounds)
            improved = rows_improved(dense, pruned.weight, solved, gram)
        return pruned._replace(weight=torch.where(improved, solved, pruned.weight))
