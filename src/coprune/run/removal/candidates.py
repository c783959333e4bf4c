"""What a budget costs: KL to the dense model, computed anew only from the first block that is another.

A budget is compared with the best so far on more and more of the tokens, and let go of as soon as it falls behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coprune.model.blocks import Block
from coprune.model.walk.recording import Recording, record_batches
from coprune.pruning.evolution import Steps
from coprune.pruning.structure.blocks import first_batches, kl_of_logits, logits_of
from coprune.run.removal.consumers import Consumers
from coprune.run.session import Session

BEHIND = 0.005
"""A budget is let go of where the batches that it has seen cost so much more than they do with the best: about what two
budgets of the same cost differ by on some hundred tokens."""

Hidden = list[Tensor]
"""What a block is given, by batch."""


@dataclass
class Candidates:
    """The model with one budget after another."""

    session: Session
    forms: Consumers
    dropped: Sequence[int]
    """Numbers of blocks that go."""
    recording: Recording
    dense: list[Tensor]
    """Logits of the dense model, by batch."""
    now: Steps
    """The budget that the weights have."""
    settled: Steps
    """The budget by which is known what every block is given."""
    hidden: list[Hidden]
    """What that is, and at the end what the last block gives."""
    sums: dict[Steps, list[float]] = field(default_factory=dict)
    """Of budgets that were looked at to the end: KL in nats, by batch."""
    touched: set[int] = field(default_factory=set)
    """Numbers of the parts that are not as they were, or may not be."""

    @classmethod
    @contextmanager
    def of(cls, session: Session, forms: Consumers, dropped: Sequence[int], tokens: int) -> Iterator[Candidates]:
        """For a while; in the end the model is dense as before. tokens: of the calibration, to be looked at at least."""
        found = cls._begun(session, forms, dropped, tokens)
        try:
            yield found
        finally:
            with torch.no_grad():
                for part in found.touched:
                    forms.write(part, 0)

    @classmethod
    @torch.no_grad()
    def _begun(cls, session: Session, forms: Consumers, dropped: Sequence[int], tokens: int) -> Candidates:
        opened = session.opened
        assert opened.samples is not None
        recording = record_batches(session.model, first_batches(opened.task.batches(opened.samples.tokens), tokens))
        none = (0,) * len(forms.places)
        found = cls(session, forms, (), recording, [], none, none, [list(recording.hidden)])
        found._run_from(0)
        found.dense = [found._logits(batch, one) for batch, one in enumerate(found.hidden[-1])]
        if dropped:
            found.dropped = dropped
            found._run_from(0)
        return found

    @torch.no_grad()
    def cost(self, steps: Steps, near: Steps | None) -> float:
        """KL(dense ‖ with these steps), in nats per token.

        Args:
            steps: the budget.
            near: one that this and the next ones are much like, and are compared with; None to look at all tokens.

        Returns:
            For one that fell behind, the cost of `near` and what it is behind so far, as if the rest were alike.
        """
        if near is not None:
            self._settle(near)
        best = None if near is None else self._sums_of(near)
        self._become(steps)
        first = self._first_other(steps, self.settled)
        rows, count = sum(len(one) for one in self.dense), len(self.dense)
        own: list[float] = []
        for batch, hidden in enumerate(self.hidden[first]):
            for block in self.session.model.blocks[first:]:
                hidden = self._run(block, batch, hidden)
            own.append(self._divergence(batch, hidden))
            seen = len(own)
            # On one batch, two, four …
            if best is not None and seen < count and seen & (seen - 1) == 0:
                behind = sum(own) - sum(best[:seen])
                if behind > BEHIND * sum(best[:seen]):
                    return (sum(best) + behind * count / seen) / rows
        self.sums[steps] = own
        return sum(own) / rows

    def _settle(self, near: Steps) -> None:
        if near != self.settled:
            first = self._first_other(near, self.settled)
            self._become(near)
            self._run_from(first)
            self.settled = near

    def _sums_of(self, settled: Steps) -> list[float]:
        """Of the budget by which the hidden states are known; another process, or run, may have looked at it."""
        if settled not in self.sums:
            self.sums[settled] = [self._divergence(batch, one) for batch, one in enumerate(self.hidden[-1])]
        return self.sums[settled]

    def _first_other(self, one: Steps, other: Steps) -> int:
        """Number of the first block in which two budgets differ; the number of blocks where none does."""
        differing = (at for at, a, b in zip(self.forms.places, one, other, strict=True) if a != b)
        return min(differing, default=len(self.session.model.blocks))

    def _become(self, steps: Steps) -> None:
        """Give the parts the weights of a budget."""
        for part, (before, after) in enumerate(zip(self.now, steps, strict=True)):
            if before != after:
                self.touched.add(part)
                self.forms.write(part, after)
        self.now = steps

    def _run(self, block: Block, batch: int, hidden: Tensor) -> Tensor:
        return hidden if block.index in self.dropped else self.recording.run(block, batch, hidden)

    def _run_from(self, first: int) -> None:
        """Run the blocks from one on, and note what each is given."""
        self.hidden = self.hidden[: first + 1]
        for block in self.session.model.blocks[first:]:
            self.hidden.append([self._run(block, batch, one) for batch, one in enumerate(self.hidden[-1])])

    def _divergence(self, batch: int, hidden: Tensor) -> float:
        return kl_of_logits(self.dense[batch], self._logits(batch, hidden))

    def _logits(self, batch: int, hidden: Tensor) -> Tensor:
        return logits_of(self.session.model, self.recording.tokens[batch], hidden)
