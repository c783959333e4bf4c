"""Sparsity patterns, in one table, and the parser of their names.

Nothing heavy is imported until a mask is chosen.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeAlias

from coprune.base.errors import BadInput
from coprune.base.words import per_cent

if TYPE_CHECKING:
    from torch import Tensor


Group = Literal["row", "matrix"]
"""The weights that compete with each other if the pattern leaves that open."""

DEFAULT_SPARSITY = 0.5
"""Default sparsity of patterns that leave it open."""


class Pattern(ABC):
    """A rule for where an O × I matrix may have zeros. Subclasses are frozen dataclasses; `str` is the inverse of `read`.

    Scores are O × I float, larger is more important; masks are O × I bool, True where a weight is kept.
    """

    usage: ClassVar[str]
    """Syntax, shown in messages."""
    first_step: ClassVar[int] = 0
    """The smallest number of its `steps` of sparsity that it can prune."""

    @classmethod
    @abstractmethod
    def read(cls, text: str) -> Self | None:
        """Parse a pattern of this kind; return None for another kind. Raises BadInput for an impossible one."""

    @classmethod
    def found_in(cls, keep: Tensor) -> Self | None:
        """Return the pattern of this kind that a mask follows, or None if the mask cannot show one."""
        return None

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros fixed by the pattern; None if it is free."""
        return None

    @property
    def group_size(self) -> int | None:
        """Number of consecutive inputs of a row in a group, a divisor of every width; None: no groups."""
        return None

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """N and M if the pattern only keeps N of every M consecutive inputs, as kernels and permutation support."""
        return None

    @abstractmethod
    def choose(self, score: Tensor, sparsity: float, group: Group) -> Tensor:
        """Choose the weights to keep: those with the largest scores, as far as the pattern allows.

        Of equal scores, the lower index is pruned first.

        Args:
            score: O × I float without NaN, whose width the pattern fits.
            sparsity: an allowed fraction of zeros.
            group: which weights compete if the pattern leaves that open.

        Returns:
            O × I bool.
        """

    @abstractmethod
    def holds(self, keep: Tensor) -> bool:
        """Return whether a mask follows the pattern; it may keep fewer weights than allowed."""

    def choose_early(self, score: Tensor, sparsity: float, reached: float, group: Group) -> Tensor:
        """Choose an intermediate mask on the way to `sparsity`, with only `reached` ≤ `sparsity` pruned.

        Weights kept in the final mask are kept; of the others the smallest are pruned first. Raises NumericalError if scores
        are NaN.
        """
        from coprune.base.selection import keep_share, refuse_nan

        final = self.choose(score, sparsity, group)
        if reached >= sparsity:
            return final
        others = score.masked_fill(final, float("inf"))
        refuse_nan(others)
        # If the pattern prunes less than requested, that may be less than `reached`, too.
        return keep_share(others, reached, group == "row") | final

    def columns_together(self, size: int) -> int:
        """Return how many of `size` columns, processed in order, must be chosen at once."""
        return size

    def exchange_within(self) -> int | None:
        """Return the number of consecutive inputs within which a zero and a kept weight may be swapped; None: the row.

        Raises BadInput if swaps would break the pattern.
        """
        raise BadInput(
            f"swaps and dsnot exchange single zeros, which the pattern {self} does not allow",
            field="pattern",
            value=str(self),
        )

    def ratio(self, asked: float | None) -> float:
        """Return the fraction of zeros for a requested sparsity, if any."""
        if self.sparsity is not None:
            return self.sparsity
        return DEFAULT_SPARSITY if asked is None else asked

    def allowed(self, sparsity: float) -> bool:
        """Return whether the pattern can have this fraction of zeros."""
        return 0 <= sparsity < 1 and (self.sparsity is None or abs(sparsity - self.sparsity) <= 1e-9)

    def with_sparsity(self, sparsity: float) -> Pattern:
        """Return the pattern of the same kind with this fraction of zeros, or the nearest."""
        return self

    def steps(self, width: int) -> int:
        """Return the number of equal steps from no zeros to all zeros for a matrix of this width."""
        return width // (self.group_size or 1)

    def sparsities_near(self, sparsity: float, reach: float, points: int) -> list[float]:
        """Return at most `points` sparsities up to `reach` below and above this one, ascending."""
        low, high = max(0.0, sparsity - reach), min(1.0, sparsity + reach)
        step = (high - low) / (points - 1)
        return [*(i * step + low for i in range(points - 1)), high]

    def fits(self, width: int) -> bool:
        """Return whether a matrix of this width can have the pattern."""
        return width % (self.group_size or 1) == 0

    def check_width(self, width: int) -> None:
        """Raise BadInput if the pattern does not fit a matrix of this width."""
        if not self.fits(width):
            raise BadInput(
                f"pattern {self} does not divide a width of {width} inputs", field="pattern", value=str(self)
            )

    def describe(self, sparsity: float) -> str:
        """Return a sparsity and the pattern as text."""
        return f"{per_cent(sparsity)} ({self})"

    def label(self, sparsity: str) -> str:
        """Return a short name of the pattern, with the formatted sparsity if the pattern leaves it open."""
        return f"{self} {sparsity}" if self.sparsity is None else str(self)


GROUP_SIZES = (2, 4, 8, 16, 32)
"""The values of M to look for in a pruned matrix."""
SLACK = 0.05
"""Share of weights that an N:M matrix may lack in its groups before it counts as unstructured."""


@dataclass(frozen=True)
class NM(Pattern):
    """N weights kept in every group of M consecutive inputs of one output row, 0 < N < M."""

    usage: ClassVar[str] = "N:M such as 2:4 (2 kept of every 4)"
    first_step: ClassVar[int] = 1

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            cause = f"pattern {self} keeps {self.n} of {self.m}"
            raise BadInput(cause, field="pattern", value=str(self), fix="take 0 < N < M, such as 2:4")

    @classmethod
    def read(cls, text: str) -> Self | None:
        match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text)
        return None if match is None else cls(int(match[1]), int(match[2]))

    @classmethod
    def found_in(cls, keep: Tensor) -> Self | None:
        from coprune.base.selection import tightest_groups

        found = tightest_groups(keep, GROUP_SIZES, SLACK)
        return None if found is None else cls(*found)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def group_size(self) -> int:
        return self.m

    @property
    def n_of_m(self) -> tuple[int, int]:
        return self.n, self.m

    def choose(self, score: Tensor, sparsity: float, group: Group) -> Tensor:
        from coprune.base.selection import keep_n_of_m

        return keep_n_of_m(score, self.n, self.m)

    def holds(self, keep: Tensor) -> bool:
        from coprune.base.selection import most_kept

        return most_kept(keep, self.m) <= self.n

    def columns_together(self, size: int) -> int:
        return self.m

    def exchange_within(self) -> int:
        return self.m

    def with_sparsity(self, sparsity: float) -> NM:
        return NM(min(max(self.m - round(sparsity * self.m), 1), self.m - 1), self.m)

    def steps(self, width: int) -> int:
        return self.m

    def sparsities_near(self, sparsity: float, reach: float, points: int) -> list[float]:
        most = max(1, int(reach * self.m + 1e-6))
        kept = range(min(self.n + most, self.m - 1), max(self.n - most, 1) - 1, -1)
        return [1 - n / self.m for n in kept]


Grid: TypeAlias = "Callable[[Tensor, slice], Tensor]"
"""Rounds values to those that can be stored, only zero to zero: (O × C float32, slice of columns) → O × C."""


@dataclass(frozen=True)
class Target:
    """Target of one matrix: a pattern and a sparsity (the fraction of zeros, 0 ≤ s < 1)."""

    pattern: Pattern
    sparsity: float
    outputs: Tensor | None = field(default=None, compare=False, repr=False)
    """Weight of an error in each output (O float32, positive); None: equal. Methods may ignore it: their rows are scaled."""

    grid: Grid | None = field(default=None, compare=False, repr=False)
    """Rounds some columns to values that can be stored; None if any can. Methods may ignore it, too."""

    def keep(self, score: Tensor, group: Group = "matrix") -> Tensor:
        """Choose the weights to keep: those with the largest scores.

        Args:
            score: O × I float, larger is more important.
            group: which weights compete if the pattern leaves that open.

        Returns:
            O × I bool. Unstructured: exactly floor(s·I) zeros per row (row) or floor(s·O·I) in total (matrix); N:M: N kept in
            every group of M.

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
        """Divisor of every width that the pattern fits."""
        return self.pattern.group_size or 1

    def with_sparsity(self, sparsity: float) -> Target:
        """Return the target with another sparsity, and a matching pattern if the pattern fixes the sparsity."""
        pattern = self.pattern.with_sparsity(sparsity)
        return replace(self, pattern=pattern, sparsity=sparsity if pattern.sparsity is None else pattern.sparsity)

    def __str__(self) -> str:
        return self.pattern.describe(self.sparsity)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Zeros anywhere. Which weights compete with each other (row or matrix) is the method's choice."""

    usage: ClassVar[str] = "'unstructured'"

    @classmethod
    def read(cls, text: str) -> Self | None:
        return cls() if text == "unstructured" else None

    @classmethod
    def found_in(cls, keep: Tensor) -> Self:
        return cls()

    def __str__(self) -> str:
        return "unstructured"

    def choose(self, score: Tensor, sparsity: float, group: Group) -> Tensor:
        from coprune.base.selection import keep_share

        return keep_share(score, sparsity, group == "row")

    def holds(self, keep: Tensor) -> bool:
        return True

    def choose_early(self, score: Tensor, sparsity: float, reached: float, group: Group) -> Tensor:
        from coprune.base.selection import refuse_nan

        # The smallest scores overall are also the smallest among the finally pruned.
        refuse_nan(score)
        return self.choose(score, reached, group)

    def exchange_within(self) -> None:
        return None

    def describe(self, sparsity: float) -> str:
        return per_cent(sparsity)

    def label(self, sparsity: str) -> str:
        return sparsity


__all__ = ["NM", "PATTERNS", "Group", "Pattern", "Target", "Unstructured", "find_pattern", "parse_pattern"]

PATTERNS: dict[str, type[Pattern]] = {
    "unstructured": Unstructured,
    "N:M": NM,
}
"""Patterns by name, from the most general to the most specific."""


def parse_pattern(text: str) -> Pattern:
    """Parse a pattern, such as `unstructured` or `2:4`. Raises BadInput on anything else."""
    for kind in PATTERNS.values():
        if (pattern := kind.read(text)) is not None:
            return pattern
    usages = " or ".join(kind.usage for kind in PATTERNS.values())
    raise BadInput(f"unknown pattern {text!r}", field="pattern", value=text, fix=f"use {usages}")


def find_pattern(keep: Tensor) -> Pattern:
    """Return the most specific pattern that a mask (O × I bool) follows."""
    found = [pattern for kind in PATTERNS.values() if (pattern := kind.found_in(keep)) is not None]
    return found[-1]
