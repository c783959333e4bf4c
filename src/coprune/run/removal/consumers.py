"""Channels and heads in the forms that an uneven budget chooses among: the consumers without some of their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from coprune.model.matrices import Matrix
from coprune.model.walk.statistics import Gram
from coprune.pruning.structure.scores import refitted, score_named
from coprune.run.removal.steps import Levels
from coprune.run.session import Session


@dataclass(frozen=True)
class Consumers:
    """The matrices whose columns fall silent, solved for anew from their Gram matrices."""

    levels: Sequence[Levels]
    refit: bool
    before: Mapping[str, Tensor]
    """Of every consumer, the dense weight."""

    @classmethod
    def of(cls, session: Session, levels: Sequence[Levels]) -> Self:
        """Those of a dense model."""
        refit = score_named(session.opened.recipe.structure.score_of("units")).refit
        return cls(levels, refit, {c.name: c.read().clone() for own in levels for c in own.part.fold.consumers})

    @property
    def places(self) -> list[int]:
        """Number of the block that every part is in."""
        return [own.block.index for own in self.levels]

    def write(self, part: int, level: int) -> None:
        """Silence what a part loses at a level."""
        own = self.levels[part]
        for keep, consumer in zip(own.keeps[level], own.part.fold.consumers, strict=True):
            consumer.write(self._solved(own, consumer, keep))

    def _solved(self, own: Levels, consumer: Matrix, keep: Tensor) -> Tensor:
        weight, columns = self.before[consumer.name], own.part.columns(keep)
        if bool(keep.all()):
            return weight
        known = own.inputs.get(consumer.name)
        statistic = None if known is None else known.statistic
        if self.refit and isinstance(statistic, Gram) and statistic.count:
            return refitted(weight, statistic, columns)
        return weight.masked_fill(~columns, 0.0)
