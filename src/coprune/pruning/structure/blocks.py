"""Which blocks are kept: by how little a block changes what goes through it, or by what the model says without it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coprune.base.options import one_of, require_not_negative, require_positive
from coprune.base.progress import Advance
from coprune.model.walk.proven import ProvenModel
from coprune.model.walk.record import run_after_blocks
from coprune.model.walk.recording import Recording, record_batches
from coprune.recipe.choice import Choice

ROWS = 256
"""Tokens whose distributions are compared at a time, each of which is as long as the vocabulary."""


class BlockScore(Protocol):
    """Chooses the blocks that go."""

    def choose(
        self, model: ProvenModel, batches: Sequence[Tensor], count: int, advance: Advance = lambda share: None
    ) -> list[int]:
        """Choose blocks.

        Args:
            model: dense, and so in the end.
            batches: what it is run on, as in `record_batches`.
            count: how many blocks go.
            advance: called with the share of the work that was just done.

        Returns:
            Their numbers, in the order in which they went.
        """
        ...


@dataclass(frozen=True)
class Influence:
    """Let the blocks go that turn their inputs least (ShortGPT, arXiv 2403.03853)."""

    def choose(
        self, model: ProvenModel, batches: Sequence[Tensor], count: int, advance: Advance = lambda share: None
    ) -> list[int]:
        found = influences(model, batches, lambda: advance(1 / len(batches)))
        return sorted(range(len(found)), key=found.__getitem__)[:count]


@dataclass(frozen=True)
class Divergence:
    """Let one block after another go: the one without which the model's distributions stay nearest to the dense model's.

    After the first round only the blocks that did best in the last one are tried again.
    """

    tokens: int = 2048
    """Of the calibration, at least so many are looked at (of images: one batch)."""
    candidates: int = 6
    """How many blocks are tried again after one went; 0: all."""

    def __post_init__(self) -> None:
        require_positive(tokens=self.tokens)
        require_not_negative(candidates=self.candidates)

    def choose(
        self, model: ProvenModel, batches: Sequence[Tensor], count: int, advance: Advance = lambda share: None
    ) -> list[int]:
        some, gone = first_batches(batches, self.tokens), list[int]()
        order = [block.index for block in model.blocks]
        while len(gone) < count:
            tried = [index for index in order if index not in gone]
            if gone and self.candidates:
                tried = tried[: self.candidates]
            found = divergences(model, some, tried, gone)
            nearest = sorted(tried, key=found.__getitem__)
            gone.append(nearest[0])
            advance(1 / count)
            order = [*nearest[1:], *(index for index in order if index not in tried)]
        return gone


def first_batches(batches: Iterable[Tensor], tokens: int) -> list[Tensor]:
    """The first batches that hold at least so many tokens; of images one."""
    some: list[Tensor] = []
    for batch in batches:
        some.append(batch)
        if batch.is_floating_point() or sum(one.numel() for one in some) >= tokens:
            break
    return some


BLOCK_SCORES: dict[str, BlockScore] = {"influence": Influence(), "kl": Divergence()}
"""Every score of blocks by its name."""


def block_score_named(asked: Choice) -> BlockScore:
    """Look up a score with its options. Raises BadInput for an unknown name or option."""
    return one_of(BLOCK_SCORES, "score", asked.name, asked.options)


@torch.no_grad()
def influences(
    model: ProvenModel, batches: Sequence[Tensor], batch_done: Callable[[], None] = lambda: None
) -> list[float]:
    """One minus the mean cosine of every block's inputs and outputs, token by token; infinite where these differ in shape.

    model, batches: as in `BlockScore.choose`.
    """
    total, count = [0.0] * len(model.blocks), [0] * len(model.blocks)
    for tokens in batches:
        recording = record_batches(model, [tokens])
        hidden = recording.hidden[0]
        for block in model.blocks:
            after = recording.run(block, 0, hidden)
            if after.shape != hidden.shape:
                total[block.index] = -torch.inf
            else:
                cosine = torch.nn.functional.cosine_similarity(hidden.float(), after.float(), dim=-1)
                total[block.index] += float(cosine.sum(dtype=torch.float64))
            count[block.index] += after[..., 0].numel()
            hidden = after
        batch_done()
    return [1.0 - cosines / max(tokens, 1) for cosines, tokens in zip(total, count, strict=True)]


@torch.no_grad()
def divergences(
    model: ProvenModel, batches: Sequence[Tensor], tried: Collection[int], gone: Collection[int] = ()
) -> dict[int, float]:
    """KL(dense ‖ without one more block), in nats per token (per image).

    What comes before the block that is tried is computed once for all of them.

    Args:
        model: the dense model.
        batches: as in `record_batches`.
        tried: numbers of the blocks that are left out one at a time.
        gone: numbers of blocks that are left out in any case.

    Returns:
        By the number of the block; infinite for one that changes the shape of what goes through it.
    """
    total, count = dict.fromkeys(tried, 0.0), 0
    for tokens in batches:
        recording = record_batches(model, [tokens])
        run = _Run(model, recording, tokens)
        dense = run.logits(recording.hidden[0], 0, ())
        count += dense.shape[0]
        hidden = recording.hidden[0]
        for block in model.blocks:
            if block.index in gone:
                continue
            after = recording.run(block, 0, hidden)
            if block.index in total and after.shape == hidden.shape:
                total[block.index] += kl_of_logits(dense, run.logits(hidden, block.index + 1, gone))
            elif block.index in total:
                total[block.index] = torch.inf
            hidden = after
    return {index: found / max(count, 1) for index, found in total.items()}


@dataclass(frozen=True)
class _Run:
    """One batch on its way through the model."""

    model: ProvenModel
    recording: Recording
    tokens: Tensor

    def logits(self, hidden: Tensor, first: int, gone: Collection[int]) -> Tensor:
        """What the model makes of a block's inputs, from that block on: N × V. gone: blocks that are left out."""
        for block in self.model.blocks[first:]:
            if block.index not in gone:
                hidden = self.recording.run(block, 0, hidden)
        model = self.model
        found = run_after_blocks(model.module, model.blocks, self.tokens, model.structure.answers, hidden)
        return found.flatten(0, -2)


def kl_of_logits(dense: Tensor, other: Tensor) -> float:
    """Sum over the rows of KL(dense ‖ other), in nats. dense, other: logits, N × V."""
    total = 0.0
    for p, q in zip(dense.split(ROWS), other.split(ROWS), strict=True):
        log_p, log_q = (one.to(torch.float32).log_softmax(dim=-1) for one in (p, q))
        total += float(torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return total
