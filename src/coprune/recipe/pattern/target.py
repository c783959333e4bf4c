"""What one matrix is to become."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import lcm
from typing import TYPE_CHECKING

from coprune.recipe.grid import Grid
from coprune.recipe.pattern.base import Group, Pattern

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Target:
    """What one matrix is to become: a pattern, a sparsity (the fraction of zeros, 0 ≤ s < 1), and a grid for what is kept."""

    pattern: Pattern
    sparsity: float
    grid: Grid | None = None
    """What kept values are rounded to; None leaves them as they come. A method that does not round them need not know."""
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
        """What divides every width that pattern and grid fit."""
        group = None if self.grid is None else self.grid.group
        return lcm(self.pattern.group_size or 1, group or 1)

    def with_sparsity(self, sparsity: float) -> Target:
        """The target with another sparsity, and with the pattern that has it where that fixes it."""
        pattern = self.pattern.with_sparsity(sparsity)
        return replace(self, pattern=pattern, sparsity=sparsity if pattern.sparsity is None else pattern.sparsity)

    def without_grid(self) -> Target:
        """The same with values as they come."""
        return self if self.grid is None else replace(self, grid=None)

    def __str__(self) -> str:
        return self.pattern.describe(self.sparsity)
