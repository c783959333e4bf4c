"""Perplexity as computed by the authors of SparseGPT and Wanda, per token and per byte of text.

The text is one stream of tokens, cut into non-overlapping windows of seqlen; the tail is dropped. Every window predicts its
tokens except the first, and perplexity is exp of the mean negative log likelihood over all windows (all have the same
length, so this is also the mean over predicted tokens). Values per byte are comparable between tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, NumericalError
from coprune.evaluation.batches import (
    batches,
    bootstrap_interval,
    cut_windows,
    default_batch_size,
    inference_logits,
    slices,
)
from coprune.evaluation.measurement import Perplexity


def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    seqlen: int,
    batch_size: int | None = None,
    token_bytes: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Perplexity:
    """Compute the perplexity of a model in memory on a stream of tokens.

    Args:
        model: a language model; not changed.
        tokens: T int64, on any device; several rows are joined to one stream.
        seqlen: tokens per window.
        batch_size: windows per batch (default: about 4096 tokens); does not change the result.
        token_bytes: T, the bytes of text of each token, for values per byte.
        advance: called with the number of windows just done.

    Returns:
        The perplexity with its 95 % bootstrap interval over the windows.

    Raises:
        BadInput: the text is shorter than one window, or a token is not in the vocabulary.
        NumericalError: the model's output is NaN.
    """
    windows = cut_windows(tokens.flatten(), seqlen)
    vocabulary = model.config.get_text_config().vocab_size
    for token in (int(windows.min()), int(windows.max())):
        if not 0 <= token < vocabulary:
            known = f"the token id {token} is outside the model's vocabulary of {vocabulary}"
            raise BadInput(known, field="tokens", fix="use the model's tokenizer")
    if batch_size is None:
        batch_size = default_batch_size(seqlen, vocabulary)
    nll: list[Tensor] = []
    with inference_logits(model) as logits_of:
        for batch in batches(windows, batch_size):
            nll.append(window_nll(logits_of(batch), batch).cpu())
            if advance is not None:
                advance(len(batch))
    sizes = None if token_bytes is None else cut_windows(token_bytes, seqlen)
    return aggregate(torch.cat(nll), seqlen, sizes)


def window_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean negative log likelihood of every window's tokens except the first, in nats: B float64.

    logits: B × S × vocabulary, any floating dtype, on any device; tokens: B × S int64, on any device. Softmax is in float32,
    slice by slice, to avoid a second copy of all logits.
    """
    predicted = []
    for window_logits, window in zip(logits, tokens.to(logits.device), strict=True):
        rows, targets = window_logits[:-1], window[1:]
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for part in slices(rows):
            loss = functional.cross_entropy(rows[part].to(torch.float32), targets[part], reduction="none")
            total += loss.sum(dtype=torch.float64)
        predicted.append(total / len(targets))
    return torch.stack(predicted)


def aggregate(nll_per_window: Tensor, seqlen: int, token_bytes: Tensor | None = None) -> Perplexity:
    """Compute the perplexity from the windows' mean negative log likelihoods.

    nll_per_window: N, nats; token_bytes: N × S, the bytes of text of each token. Raises NumericalError for NaN.
    """
    nll = nll_per_window.to(device="cpu", dtype=torch.float64)
    broken = nll.isnan().nonzero().flatten()
    if len(broken):
        raise NumericalError(
            f"the model's output is NaN in {len(broken)} of {len(nll)} evaluation windows (first: {int(broken[0])})"
        )
    interval = bootstrap_interval(nll)
    value, tokens = float(nll.mean()), len(nll) * (seqlen - 1)
    # The first token of a window is not predicted, so its bytes do not count.
    size = 0 if token_bytes is None else int(token_bytes[:, 1:].sum())
    per_byte = value * tokens / size if size else None
    return Perplexity(
        value=_exp(value),
        seqlen=seqlen,
        windows=len(nll),
        tokens=tokens,
        interval=None if interval is None else (_exp(interval[0]), _exp(interval[1])),
        bits_per_byte=None if per_byte is None else per_byte / math.log(2),
        per_byte=None if per_byte is None else _exp(per_byte),
        window_nll=tuple(nll.tolist()),
    )


def _exp(value: float) -> float:
    # math.exp raises on overflow, but a broken model has perplexity inf.
    return float(torch.tensor(value, dtype=torch.float64).exp())
