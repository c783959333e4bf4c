"""What one matrix is to become."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from coprune.recipe.pattern.base import Group, Pattern

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Target:
    """What one matrix is to become: a pattern and a sparsity (the fraction of zeros, 0 ≤ s < 1)."""

    pattern: Pattern
    sparsity: float
    outputs: Tensor | None = field(default=None, compare=False, repr=False)
    """By how much an error in each output counts beside the others' (O float32, positive); None: all alike. A method need
    not know: it is given rows that are larger by as much."""

    def keep(self, score: Tensor, group: Group = "matrix") -> Tensor:
        """Choose the weights to keep, those with the largest scores.

        Args:
            score: O × I float, the larger the more important.
            group: which weights compete where the pattern leaves that open.

        Returns:
            O × I bool: for unstructured with exactly floor(s·I) zeros per row (row) or floor(s·O·I) in all (matrix),
            for N:M with N kept in every group of M.

        Raises:
            NumericalError: scores are NaN.
            BadInput: the pattern does not fit the width.
        """
        from coprune.base.selection import refuse_nan

        refuse_nan(score)
        self.pattern.check_width(score.shape[1])
        return self.pattern.choose(score, self.sparsity, group)

    @property
    def multiple(self) -> int:
        """What divides every width that the pattern fits."""
        return self.pattern.group_size or 1

    def with_sparsity(self, sparsity: float) -> Target:
        """The target with another sparsity, and with the pattern that has it where that fixes it."""
        pattern = self.pattern.with_sparsity(sparsity)
        return replace(self, pattern=pattern, sparsity=sparsity if pattern.sparsity is None else pattern.sparsity)

    def __str__(self) -> str:
        return self.pattern.describe(self.sparsity)
