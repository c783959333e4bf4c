"""What a pattern is: everything that the rest of the program asks about where zeros may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from coprune.base.errors import BadInput
from coprune.base.shown import per_cent

if TYPE_CHECKING:
    from torch import Tensor

Group = Literal["row", "matrix"]
"""Which weights compete with each other where the pattern leaves that open."""

DEFAULT_SPARSITY = 0.5
"""What is asked for where neither a pattern nor a recipe says."""


class Pattern(ABC):
    """A rule for where zeros may be in an O × I matrix. Subclasses are frozen dataclasses; `str` gives what `read` takes.

    Scores are O × I float, the larger the more important; masks are O × I bool, True where a weight is kept.
    """

    usage: ClassVar[str]
    """How it is written, for messages."""
    first_step: ClassVar[int] = 0
    """The fewest of its `steps` of sparsity that it can be pruned by."""

    @classmethod
    @abstractmethod
    def read(cls, text: str) -> Self | None:
        """Read a pattern of this kind; None for a text of another kind. Raises BadInput for an impossible one."""

    @classmethod
    def found_in(cls, keep: Tensor) -> Self | None:
        """Tell which pattern of this kind a pruned matrix follows; None if none that can be told from its mask."""
        return None

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros that the pattern fixes; None where it is free."""
        return None

    @property
    def group_size(self) -> int | None:
        """How many consecutive inputs of a row belong together, so that it has to divide a width; None: no groups."""
        return None

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """N and M if all it asks is to keep N of every M consecutive inputs, which kernels and permutation can do."""
        return None

    @abstractmethod
    def choose(self, score: Tensor, sparsity: float, group: Group) -> Tensor:
        """Choose which weights to keep: those with the largest scores, as far as the pattern allows.

        Of equal scores the one with the lower index is pruned first.

        Args:
            score: O × I float without NaN, of a width that the pattern fits.
            sparsity: an allowed fraction of zeros.
            group: which weights compete where the pattern leaves that open.

        Returns:
            O × I bool.
        """

    @abstractmethod
    def holds(self, keep: Tensor) -> bool:
        """Tell whether a mask follows the pattern; fewer weights than it allows may be kept."""

    def choose_early(self, score: Tensor, sparsity: float, reached: float, group: Group) -> Tensor:
        """Choose a mask on the way to `sparsity` when only `reached` ≤ sparsity is to be pruned.

        What the pattern keeps in the end is kept, and of the others the smallest are pruned first. Raises
        NumericalError if scores are NaN.
        """
        from coprune.base.selection import keep_share, refuse_nan

        final = self.choose(score, sparsity, group)
        if reached >= sparsity:
            return final
        others = score.masked_fill(final, float("inf"))
        refuse_nan(others)
        # Where the pattern can prune less than was asked for, it may be less than `reached`, too.
        return keep_share(others, reached, group == "row") | final

    def columns_together(self, size: int) -> int:
        """Of so many columns that are walked through in order, how many have to be chosen at once."""
        return size

    def exchange_within(self) -> int | None:
        """Within how many consecutive inputs of a row a zero may change places with a kept weight; None: the row.

        Raises BadInput where that would break the pattern.
        """
        raise BadInput(
            f"the pattern {self} does not let single zeros change places, which swaps and dsnot do",
            field="pattern",
            value=str(self),
        )

    def ratio(self, asked: float | None) -> float:
        """The fraction of zeros that is meant by what was asked for, if anything was."""
        if self.sparsity is not None:
            return self.sparsity
        return DEFAULT_SPARSITY if asked is None else asked

    def allowed(self, sparsity: float) -> bool:
        """Tell whether the pattern can have this fraction of zeros."""
        return 0 <= sparsity < 1 and (self.sparsity is None or abs(sparsity - self.sparsity) <= 1e-9)

    def with_sparsity(self, sparsity: float) -> Pattern:
        """The pattern of the same kind with, or next to, this fraction of zeros."""
        return self

    def steps(self, width: int) -> int:
        """In how many equal steps a matrix of this width goes from no zeros to nothing but zeros."""
        return width // (self.group_size or 1)

    def sparsities_near(self, sparsity: float, reach: float, points: int) -> list[float]:
        """At most `points` sparsities up to `reach` below and above this one, ascending."""
        low, high = max(0.0, sparsity - reach), min(1.0, sparsity + reach)
        step = (high - low) / (points - 1)
        return [*(i * step + low for i in range(points - 1)), high]

    def fits(self, width: int) -> bool:
        """Tell whether a matrix with so many inputs can have the pattern."""
        return width % (self.group_size or 1) == 0

    def check_width(self, width: int) -> None:
        """Raise BadInput where the pattern does not fit so many inputs."""
        if not self.fits(width):
            raise BadInput(
                f"pattern {self} does not divide a width of {width} inputs", field="pattern", value=str(self)
            )

    def describe(self, sparsity: float) -> str:
        """A sparsity and the pattern of its zeros, for people."""
        return f"{per_cent(sparsity)} ({self})"

    def label(self, sparsity: str) -> str:
        """A short name of the pattern with a sparsity, written as the caller likes, where that is free."""
        return f"{self} {sparsity}" if self.sparsity is None else str(self)
