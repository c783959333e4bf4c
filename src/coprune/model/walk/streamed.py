"""Logits of a model whose blocks are read one at a time: a walk that only looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coprune.model.walk.activations import Activations
from coprune.model.walk.moves import Dense
from coprune.model.walk.proven import ProvenModel
from coprune.model.walk.record import run_after_blocks
from coprune.model.walk.recording import record_batches
from coprune.model.walk.walk import Walk


@torch.no_grad()
def streamed_logits(
    model: ProvenModel,
    windows: Sequence[Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    advance: Callable[[float], None] = lambda blocks: None,
    activations: Activations | None = None,
) -> list[Tensor]:
    """Run batches of windows through the blocks, each read once, and score their logits.

    Args:
        model: the model; its chosen matrices do not matter.
        windows: B × S int64 each, or images.
        score: (logits B × S × V, tokens B × S) → what is kept of a batch.
        advance: called with the share of a block that was done.
        activations: an empty list for the hidden states; without it they are kept in memory.

    Returns:
        What was kept of every batch.
    """
    recording = record_batches(model, windows, activations)
    for _ in Walk(model.idle(), recording, moves=Dense(), advance=advance):
        pass
    kept = []
    for position, tokens in enumerate(windows):
        hidden = recording.hidden[position]
        kept.append(
            score(run_after_blocks(model.module, model.blocks, tokens, model.structure.answers, hidden), tokens)
        )
    return kept
