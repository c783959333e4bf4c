"""Perplexity of a model whose blocks are read one at a time: a walk that only looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coprune.evaluation.batches import batches, cut_windows, default_batch_size
from coprune.evaluation.perplexity import Perplexity, aggregate, window_nll
from coprune.model.blocks import Block
from coprune.model.checkpoint.weights import Weights
from coprune.model.walk.activations import Activations
from coprune.model.walk.prove import Structure
from coprune.model.walk.record import input_device, run_after_blocks
from coprune.model.walk.recording import record_batches
from coprune.model.walk.walk import Walk


@torch.no_grad()
def streamed_logits(
    weights: Weights,
    blocks: Sequence[Block],
    structure: Structure,
    windows: Sequence[Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    advance: Callable[[float], None] = lambda blocks: None,
    activations: Activations | None = None,
) -> list[Tensor]:
    """Run batches of windows (B × S int64 each) through the blocks, each read once, and score their logits.

    score: (logits B × S × V, tokens B × S) → what is kept of a batch. advance: called with the share of a block done;
    activations: an empty list for the hidden states (default: one in memory).
    """
    recording = record_batches(weights.model, blocks, structure, windows, activations)
    plain = Structure(structure.sample, structure.answers, [[] for _ in blocks])
    for _ in Walk(
        weights,
        blocks,
        [[] for _ in blocks],
        structure=plain,
        recording=recording,
        changes=False,
        need_outputs=True,
        advance=advance,
    ):
        pass
    kept = []
    for position, tokens in enumerate(windows):
        logits = run_after_blocks(weights.model, blocks, tokens, structure.answers, recording.hidden[position])
        kept.append(score(logits, tokens))
    return kept


def streamed_perplexity(
    weights: Weights,
    blocks: Sequence[Block],
    structure: Structure,
    tokens: Tensor,
    seqlen: int,
    batch_size: int | None = None,
    token_bytes: Tensor | None = None,
    advance: Callable[[float], None] = lambda blocks: None,
    activations: Activations | None = None,
) -> Perplexity:
    """As `perplexity`, for weights that may be streamed; advance and activations as in `streamed_logits`."""
    windows = cut_windows(tokens, seqlen).to(input_device(weights.model))
    size = batch_size or default_batch_size(seqlen, weights.model.config.get_text_config().vocab_size)
    nll = streamed_logits(
        weights,
        blocks,
        structure,
        list(batches(windows, size)),
        lambda logits, t: window_nll(logits, t).cpu(),
        advance,
        activations,
    )
    sizes = None if token_bytes is None else cut_windows(token_bytes, seqlen)
    return aggregate(torch.cat(nll), seqlen, sizes)
