"""Closeness of a pruned model to the dense one, without labels.

Measured at every position that perplexity predicts from: the divergence of next-token distributions and the agreement of
their most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, NumericalError
from coprune.base.precision import total
from coprune.evaluation.batches import (
    batches,
    bootstrap_interval,
    cut_windows,
    default_batch_size,
    inference_logits,
    slices,
)
from coprune.evaluation.measurement import Closeness
from coprune.evaluation.perplexity import window_nll


class OtherTokens(BadInput):
    """The error for two models whose distributions are over different tokens."""


class LogitComparison(NamedTuple):
    """Means over each window's positions except the last: KL(dense ‖ pruned) in nats and agreement, both B float64."""

    kl: Tensor
    top1_agreement: Tensor


def closeness(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokens: Tensor,
    seqlen: int,
    batch_size: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[Closeness, Tensor]:
    """Compare two models in memory on a stream of tokens, cut into windows as for perplexity.

    tokens: T int64; batch_size: windows at once (default: about 2048 tokens, since two models' logits are held);
    advance: called with the number of windows just done.
    Returns the closeness, and the pruned model's mean negative log likelihood of every window as `window_nll` computes it, which
    saves a third forward pass. Raises BadInput if the text is shorter than one window or the vocabularies differ, NumericalError
    for NaN.
    """
    vocabulary = dense.config.get_text_config().vocab_size
    if pruned.config.get_text_config().vocab_size != vocabulary:
        raise OtherTokens(
            f"the models have {vocabulary} and {pruned.config.get_text_config().vocab_size} tokens in their "
            "vocabularies, so their distributions cannot be compared",
            field="against",
            fix="give a dense model of the same family",
        )
    windows = cut_windows(tokens, seqlen)
    if batch_size is None:
        batch_size = default_batch_size(2 * seqlen, vocabulary)
    compared: list[LogitComparison] = []
    nll: list[Tensor] = []
    with inference_logits(dense) as dense_logits, inference_logits(pruned) as pruned_logits:
        for batch in batches(windows, batch_size):
            logits = pruned_logits(batch)
            comparison = compare_logits(dense_logits(batch), logits)
            compared.append(LogitComparison(*(values.cpu() for values in comparison)))
            nll.append(window_nll(logits, batch).cpu())
            if advance is not None:
                advance(len(batch))
    return aggregate_closeness(compared, seqlen), torch.cat(nll)


def compare_logits(dense: Tensor, pruned: Tensor) -> LogitComparison:
    """Compare the next-token distributions of two models on the same windows.

    dense, pruned: B × S × vocabulary, any floating dtype and device. Softmax is in float32, slice by slice. A window's last
    position is left out, as in perplexity.
    """
    kl, agreement = [], []
    for dense_rows, pruned_rows in zip(dense[:, :-1], pruned[:, :-1], strict=True):
        divergence = torch.zeros((), dtype=torch.float64, device=dense.device)
        same = torch.zeros((), dtype=torch.float64, device=dense.device)
        for part in slices(dense_rows):
            expected, found = (log_probabilities(rows[part], dense.device) for rows in (dense_rows, pruned_rows))
            divergence += summed_kl(expected, found)
            same += (expected.argmax(dim=-1) == found.argmax(dim=-1)).sum()
        kl.append(divergence / len(dense_rows))
        agreement.append(same / len(dense_rows))
    return LogitComparison(torch.stack(kl), torch.stack(agreement))


def log_probabilities(logits: Tensor, device: torch.device) -> Tensor:
    """Return log probabilities of the next token in float32 on a device. logits: N × vocabulary."""
    return functional.log_softmax(logits.to(device=device, dtype=torch.float32), dim=-1)


def summed_kl(expected: Tensor, found: Tensor) -> Tensor:
    """Sum over the rows of KL(expected ‖ found) in nats, float64. Both are outputs of `log_probabilities`."""
    return total(functional.kl_div(found, expected, reduction="none", log_target=True))


def aggregate_closeness(compared: list[LogitComparison], seqlen: int) -> Closeness:
    """Aggregate the batches' comparisons. Raises NumericalError if a divergence is NaN."""
    kl = torch.cat([comparison.kl for comparison in compared])
    agreement = torch.cat([comparison.top1_agreement for comparison in compared])
    if bool(kl.isnan().any()):
        raise NumericalError(f"the models' outputs are NaN in {int(kl.isnan().sum())} of {len(kl)} evaluation windows")
    return Closeness(
        # Rounding can make the divergence of equal distributions negative.
        kl=max(0.0, float(kl.mean())),
        kl_interval=bootstrap_interval(kl),
        top1_agreement=float(agreement.mean()),
        top1_interval=bootstrap_interval(agreement),
        seqlen=seqlen,
        windows=len(kl),
        positions=len(kl) * (seqlen - 1),
    )
