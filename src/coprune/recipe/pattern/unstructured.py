"""Zeros anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from coprune.base.shown import per_cent
from coprune.recipe.pattern.base import Group, Pattern

if TYPE_CHECKING:
    from torch import Tensor


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

        # The smallest of all are the smallest of those that are pruned in the end.
        refuse_nan(score)
        return self.choose(score, reached, group)

    def exchange_within(self) -> None:
        return None

    def describe(self, sparsity: float) -> str:
        return per_cent(sparsity)

    def label(self, sparsity: str) -> str:
        return sparsity
