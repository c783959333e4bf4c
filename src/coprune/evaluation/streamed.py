"""Perplexity of a model whose blocks are read one at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from coprune.data import EvaluationText
from coprune.evaluation.batches import batches, cut_windows, default_batch_size
from coprune.evaluation.measurement import Perplexity
from coprune.evaluation.perplexity import aggregate, window_nll
from coprune.model.walk.activations import Activations
from coprune.model.walk.proven import ProvenModel
from coprune.model.walk.record import input_device
from coprune.model.walk.streamed import streamed_logits


@torch.no_grad()
def streamed_perplexity(
    model: ProvenModel,
    text: EvaluationText,
    seqlen: int,
    batch_size: int | None = None,
    advance: Callable[[float], None] = lambda blocks: None,
    activations: Activations | None = None,
) -> Perplexity:
    """As `perplexity`, for weights that may be streamed; advance and activations as in `streamed_logits`."""
    windows = cut_windows(text.tokens, seqlen).to(input_device(model.module))
    size = batch_size or default_batch_size(seqlen, model.module.config.get_text_config().vocab_size)
    parts = list(batches(windows, size))
    nll = streamed_logits(model, parts, lambda logits, t: window_nll(logits, t).cpu(), advance, activations)
    return aggregate(torch.cat(nll), seqlen, cut_windows(text.token_bytes, seqlen))
