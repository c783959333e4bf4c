"""What an uneven budget costs: KL to the dense model, computed anew only from the first block that is another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from coprune.model.blocks import Block
from coprune.model.matrices import Matrix
from coprune.model.walk.recording import Recording, record_batches
from coprune.model.walk.statistics import Gram
from coprune.pruning.structure.blocks import first_batches, kl_of_logits, logits_of
from coprune.pruning.structure.scores import refitted, score_named
from coprune.run.removal.steps import Levels, Steps
from coprune.run.session import Session

Hidden = list[Tensor]
"""What a block is given, by batch."""


@dataclass
class Candidates:
    """The model in which consumers' columns are silent, one budget after another."""

    session: Session
    levels: Sequence[Levels]
    dropped: Sequence[int]
    """Numbers of blocks that go."""
    recording: Recording
    refit: bool
    before: dict[str, Tensor]
    """Of every consumer, the dense weight."""
    dense: list[Tensor]
    """Logits of the dense model, by batch."""
    now: Steps
    """The budget that the weights have."""
    settled: Steps
    """The budget by which is known what every block is given."""
    hidden: list[Hidden]
    """What that is, and at the end what the last block gives."""

    @classmethod
    @contextmanager
    @torch.no_grad()
    def of(
        cls, session: Session, levels: Sequence[Levels], dropped: Sequence[int], tokens: int
    ) -> Iterator[Candidates]:
        """For a while; in the end the model is dense as before. tokens: of the calibration, to be looked at at least."""
        opened = session.opened
        assert opened.samples is not None
        recording = record_batches(session.model, first_batches(opened.task.batches(opened.samples.tokens), tokens))
        refit = score_named(opened.recipe.structure.score_of("units")).refit
        before = {c.name: c.read().clone() for own in levels for c in own.part.fold.consumers}
        none = (0,) * len(levels)
        found = cls(session, levels, (), recording, refit, before, [], none, none, [list(recording.hidden)])
        found._run_from(0)
        found.dense = found._logits(found.hidden[-1])
        if dropped:
            found.dropped = dropped
            found._run_from(0)
        try:
            yield found
        finally:
            found._become(none)

    @torch.no_grad()
    def cost(self, steps: Steps, near: Steps | None) -> float:
        """KL(dense ‖ with these steps), in nats per token. near: a budget that this one and the next ones are much like."""
        near = self.settled if near is None else near
        if near != self.settled:
            first = self._first_other(near, self.settled)
            self._become(near)
            self._run_from(first)
            self.settled = near
        self._become(steps)
        first = self._first_other(steps, near)
        hidden = self.hidden[first]
        for block in self.session.model.blocks[first:]:
            hidden = self._run(block, hidden)
        rows = sum(len(one) for one in self.dense)
        return sum(kl_of_logits(p, q) for p, q in zip(self.dense, self._logits(hidden), strict=True)) / rows

    def _first_other(self, one: Steps, other: Steps) -> int:
        """Number of the first block in which two budgets differ; the number of blocks where none does."""
        differing = (own.block.index for own, a, b in zip(self.levels, one, other, strict=True) if a != b)
        return min(differing, default=len(self.session.model.blocks))

    def _become(self, steps: Steps) -> None:
        """Give the consumers the weights of a budget."""
        for own, before, after in zip(self.levels, self.now, steps, strict=True):
            if before != after:
                for keep, consumer in zip(own.keeps[after], own.part.fold.consumers, strict=True):
                    consumer.write(self._solved(own, consumer, keep))
        self.now = steps

    def _solved(self, own: Levels, consumer: Matrix, keep: Tensor) -> Tensor:
        weight, columns = self.before[consumer.name], own.part.columns(keep)
        if bool(keep.all()):
            return weight
        known = own.inputs.get(consumer.name)
        statistic = None if known is None else known.statistic
        if self.refit and isinstance(statistic, Gram) and statistic.count:
            return refitted(weight, statistic, columns)
        return weight.masked_fill(~columns, 0.0)

    def _run(self, block: Block, hidden: Hidden) -> Hidden:
        if block.index in self.dropped:
            return hidden
        return [self.recording.run(block, batch, one) for batch, one in enumerate(hidden)]

    def _run_from(self, first: int) -> None:
        """Run the blocks from one on, and note what each is given."""
        self.hidden = self.hidden[: first + 1]
        for block in self.session.model.blocks[first:]:
            self.hidden.append(self._run(block, self.hidden[-1]))

    def _logits(self, hidden: Hidden) -> list[Tensor]:
        model, batches = self.session.model, zip(self.recording.tokens, hidden, strict=True)
        return [logits_of(model, tokens, one) for tokens, one in batches]
