"""The cost of a budget: KL to the dense model, recomputed only from the first block that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from coprune.model.blocks import Block
from coprune.model.matrices import Matrix
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.recording import Recording, record_batches
from coprune.model.walk.statistics import Gram
from coprune.removal.block_scores import kl_of_logits, logits_of
from coprune.removal.channels_and_heads import Part
from coprune.removal.unit_scores import Score, by_norm, curve, energy, refitted, score_named
from coprune.run.calibrating import first_batches
from coprune.run.context import Run

Steps = tuple[int, ...]
"""Number of steps removed from each part."""


@dataclass(frozen=True)
class Levels:
    """A part and its kept units at every level, starting with the whole part."""

    block: Block
    part: Part
    counts: list[int]
    """Number of kept units by level."""
    keeps: list[list[Tensor]]
    """Kept units by level: U bool for each consumer."""
    costs: list[float]
    """Squared error of the consumers' outputs, relative to their norm."""
    moved: float
    """How much the block changes the dense model's hidden states."""
    inputs: Mapping[str, Inputs]
    """Inputs of the consumers in the dense model, by name."""

    @classmethod
    def of(
        cls, block: Block, part: Part, counts: list[int], inputs: Mapping[str, Inputs], score: Score, moved: float = 1.0
    ) -> Self:
        """Choose the units of a part at every level, with the relative cost.

        Args:
            block: the loaded block.
            part: one of its parts.
            counts: number of kept units by level, descending.
            inputs: Gram matrices of the consumers' inputs in the dense model, by name.
            score: chooses the units.
            moved: how much the block changes the hidden states.
        """
        keeps: list[list[Tensor]] = [[] for _ in counts]
        costs, total = [0.0] * len(counts), 0.0
        for consumer in part.fold.consumers:
            weight, known = consumer.read(), inputs.get(consumer.name)
            statistic = None if known is None else known.statistic
            units, numbers = part.grouped.to(weight.device), [count // part.group for count in counts]
            if not isinstance(statistic, Gram) or not statistic.count:
                for own, count in zip(keeps, numbers, strict=True):
                    own.append(part.ungrouped(by_norm(weight, units, count)))
                continue
            total += statistic.count * energy(weight, statistic)
            for at, (keep, cost) in enumerate(curve(score, weight, statistic, units, numbers)):
                keeps[at].append(part.ungrouped(keep))
                costs[at] += statistic.count * cost
        seen = {consumer.name: inputs[consumer.name] for consumer in part.fold.consumers if consumer.name in inputs}
        return cls(block, part, counts, keeps, [cost / total if total else 0.0 for cost in costs], moved, seen)

    def steps_to(self, count: int) -> int:
        """Return the number of steps at which `count` units are kept."""
        return self.counts.index(count)


@dataclass(frozen=True)
class Consumers:
    """The matrices whose columns are silenced, refitted from their Gram matrices."""

    levels: Sequence[Levels]
    refit: bool
    before: Mapping[str, Tensor]
    """Dense weight of each consumer, by name."""

    @classmethod
    def of(cls, run: Run, levels: Sequence[Levels]) -> Self:
        """Copy the consumers of a dense model."""
        refit = score_named(run.recipe.remove.score_of("units")).refit
        return cls(levels, refit, {c.name: c.read().clone() for own in levels for c in own.part.fold.consumers})

    @property
    def places(self) -> list[int]:
        """Block number of each part."""
        return [own.block.index for own in self.levels]

    def write(self, part: int, level: int) -> None:
        """Silence the units removed from a part at a level."""
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


@dataclass
class Candidates:
    """The model under successive budgets."""

    run: Run
    forms: Consumers
    dropped: Sequence[int]
    """Numbers of the removed blocks."""
    dense: list[Tensor]
    """Logits of the dense model, by batch."""
    now: Steps
    """The budget currently applied to the weights."""
    states: list[Recording]
    """The uncut state of the batches before each block, and after the last."""
    touched: set[int] = field(default_factory=set)
    """Numbers of the parts that may differ from the dense model."""

    @classmethod
    @contextmanager
    def of(cls, run: Run, forms: Consumers, dropped: Sequence[int], tokens: int) -> Iterator[Candidates]:
        """Yield candidates; restore the dense model afterwards. tokens: minimum number of calibration tokens."""
        found = cls._begun(run, forms, dropped, tokens)
        try:
            yield found
        finally:
            with torch.no_grad():
                for part in found.touched:
                    forms.write(part, 0)

    @classmethod
    @torch.no_grad()
    def _begun(cls, run: Run, forms: Consumers, dropped: Sequence[int], tokens: int) -> Candidates:
        assert run.samples is not None
        recording = record_batches(run.model, first_batches(run.task.inputs.batches(run.samples.tokens), tokens))
        none = (0,) * len(forms.places)
        found = cls(run, forms, (), [], none, [recording])
        found._record()
        found.dense = [found._logits(batch, one) for batch, one in enumerate(found.states[-1].hidden)]
        if dropped:
            found.dropped = dropped
            found._record()
        return found

    @torch.no_grad()
    def cost(self, steps: Steps) -> float:
        """Return KL(dense ‖ after removing these steps), in nats per token."""
        self._apply(steps)
        blocks = self.run.model.blocks
        first = min((at for at, taken in zip(self.forms.places, steps, strict=True) if taken), default=len(blocks))
        state = self.states[first].apart()
        for block in blocks[first:]:
            self._go_past(state, block)
        own = [self._divergence(batch, hidden) for batch, hidden in enumerate(state.hidden)]
        return sum(own) / sum(len(one) for one in self.dense)

    def _apply(self, steps: Steps) -> None:
        """Apply a budget to the weights."""
        for part, (before, after) in enumerate(zip(self.now, steps, strict=True)):
            if before != after:
                self.touched.add(part)
                self.forms.write(part, after)
        self.now = steps

    def _go_past(self, state: Recording, block: Block) -> None:
        state.go_past(self.run.model, block, runs=block.index not in self.dropped)

    def _record(self) -> None:
        """Run all blocks and record the input of each."""
        self.states = self.states[:1]
        for block in self.run.model.blocks:
            self.states.append(self.states[-1].apart())
            self._go_past(self.states[-1], block)

    def _divergence(self, batch: int, hidden: Tensor) -> float:
        return kl_of_logits(self.dense[batch], self._logits(batch, hidden))

    def _logits(self, batch: int, hidden: Tensor) -> Tensor:
        return logits_of(self.run.model, self.states[0].tokens[batch], hidden)
