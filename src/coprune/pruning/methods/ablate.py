"""Ablations of SparseGPT: its weight update with the masks of magnitude or Wanda (section 5 of arXiv 2306.11695).

`sequential` fixes the mask of the whole matrix before the update; `iterative` chooses it block by block from weights
that the update has already changed, as SparseGPT itself does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from coprune.base.method_options import require_positive
from coprune.model.walk.statistics import Gram
from coprune.pruning.linear_algebra import unless_all_zero
from coprune.pruning.methods.base import Pruned
from coprune.pruning.methods.sparsegpt import inverse_factor_of, update_columns
from coprune.pruning.methods.wanda import wanda_score
from coprune.recipe.pattern import Target


@dataclass(frozen=True)
class Ablate:
    """SparseGPT's update with another pruning criterion.

    Paper: section 5 of arXiv 2306.11695.
    """

    score: Literal["magnitude", "wanda"] = "wanda"
    """|W|, or |W| times the input norm."""
    selection: Literal["sequential", "iterative"] = "sequential"
    """Whether the mask is chosen before the update (`sequential`) or along with it (`iterative`)."""
    block_size: int = 128
    """Columns whose mask is chosen together (iterative, unstructured); for N:M it is rounded up to a multiple of M."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    statistic: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        require_positive(block_size=self.block_size, damping=self.damping)

    def prune(self, weight: Tensor, statistic: Gram, target: Target) -> Pruned:
        factor = inverse_factor_of(statistic, self.damping)
        if self.selection == "sequential":
            dense_score = wanda_score(weight, statistic) if self.score == "wanda" else weight.abs()
            mask = target.keep(dense_score, "row" if self.score == "wanda" else "matrix")
            return update_columns(weight, factor, target, self.block_size, lambda _, columns: mask[:, columns])
        # The authors divide these norms by the sample count again while averaging, which weights early samples more;
        # this is the plain mean over all tokens.
        norm = unless_all_zero(statistic.root_mean_square)

        def choose(current: Tensor, columns: slice) -> Tensor:
            return target.keep(current.abs() * norm[columns] if self.score == "wanda" else current.abs())

        return update_columns(weight, factor, target, self.block_size, choose)
