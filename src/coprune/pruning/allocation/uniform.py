"""Uniform allocation, as in most papers: every matrix has the overall target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coprune.pruning.allocation.base import Shown, Unit
from coprune.recipe.pattern import Target


@dataclass(frozen=True)
class Uniform:
    """Prune every matrix alike."""

    looks: ClassVar[bool] = False
    statistic: ClassVar[None] = None
    first: ClassVar[int] = 0

    def measure(self, shown: Sequence[Shown], target: Target) -> dict[str, Tensor]:
        return {}

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        return [target] * len(units)
