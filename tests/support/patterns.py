"""A pattern of which the program knows nothing: blocks of consecutive inputs that are kept or pruned whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from coprune.base.selection import keep_share
from coprune.recipe.pattern import Group, Pattern


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of 1 × width weights, kept or pruned whole."""

    usage: ClassVar[str] = "1xW such as 1x4"

    width: int

    @classmethod
    def read(cls, text: str) -> Self | None:
        match = re.fullmatch(r"1x(\d+)", text)
        return None if match is None else cls(int(match[1]))

    def __str__(self) -> str:
        return f"1x{self.width}"

    @property
    def group_size(self) -> int:
        return self.width

    def choose(self, score: Tensor, sparsity: float, group: Group) -> Tensor:
        blocks = score.reshape(score.shape[0], -1, self.width).sum(dim=2)
        return keep_share(blocks, sparsity, group == "row").repeat_interleave(self.width, dim=1)

    def holds(self, keep: Tensor) -> bool:
        kept = keep.reshape(keep.shape[0], -1, self.width).sum(dim=2)
        return bool(((kept == 0) | (kept == self.width)).all())
