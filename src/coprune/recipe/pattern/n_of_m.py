"""N kept of every M consecutive inputs, as hardware with sparse products wants it (2:4)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from coprune.base.errors import BadInput
from coprune.recipe.pattern.base import Group, Pattern

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZES = (2, 4, 8, 16, 32)
"""The M that are looked for in a pruned matrix."""
SLACK = 0.05
"""Share of weights that may be missing from the groups of an N:M matrix before it counts as unstructured."""


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
