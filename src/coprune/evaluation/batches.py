"""Common parts of all measurements on text: windows, batches of them, the models' logits, and a bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.memory import freed_memory_kept
from coprune.base.words import Setting
from coprune.model.checkpoint.load import evaluating
from coprune.model.walk.block_calls import forward_logits, input_device

Logits = Callable[[Tensor], Tensor]
"""A batch as in `forward_logits` → its logits: windows × seqlen × vocabulary, or images × classes; any floating dtype."""

BATCH_TOKENS = 4096
# The logits of a batch are the largest tensor of an evaluation, limited to this many values (1 GiB in float32).
BATCH_LOGITS = 2**28


def cut_windows(tokens: Tensor, seqlen: int) -> Tensor:
    """Cut a stream of T tokens into non-overlapping windows (windows × seqlen), dropping the rest.

    Raises BadInput if the text is shorter than one window, or seqlen leaves nothing to predict.
    """
    if seqlen < 2:
        raise BadInput(
            f"the sequence length must be at least 2, not {seqlen}: one token of context and one to predict",
            field="seqlen",
            value=seqlen,
        )
    windows = tokens.numel() // seqlen
    if windows == 0:
        raise BadInput(
            f"the text has {tokens.numel()} tokens, less than one window of {seqlen}",
            fix=("use a shorter one with ", Setting("seqlen")),
        )
    return tokens[: windows * seqlen].view(windows, seqlen)


def default_batch_size(seqlen: int, vocabulary: int) -> int:
    """Return the number of windows per batch, from the memory of their logits."""
    return max(1, min(BATCH_TOKENS, BATCH_LOGITS // vocabulary) // seqlen)


def batches(windows: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of windows. Raises BadInput for a batch size below 1."""
    if batch_size < 1:
        raise BadInput(f"the batch size must be at least 1, not {batch_size}", field="batch_size", value=batch_size)
    yield from torch.split(windows, batch_size)


@contextmanager
def inference_logits(model: PreTrainedModel) -> Iterator[Logits]:
    """Yield a function that computes logits of a model in memory, without dropout or gradients, and restore training modes."""
    device = input_device(model)

    def logits_of(batch: Tensor) -> Tensor:
        return forward_logits(model, batch.to(device))

    with evaluating(model), torch.inference_mode(), freed_memory_kept():
        yield logits_of


SLICE_VALUES = 2**24
"""Number of logits converted to float32 at a time."""


def slices(logits: Tensor, most_values: int = SLICE_VALUES) -> Iterator[slice]:
    """Cut the rows of logits (rows × vocabulary) into slices of at most 2²⁴ values: 64 MiB in float32."""
    rows, vocabulary = logits.shape
    step = max(1, most_values // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


_RESAMPLES = 2000


def bootstrap_interval(per_window: Tensor) -> tuple[float, float] | None:
    """Estimate the 95 % interval of the mean over windows by the percentile bootstrap, seeded.

    per_window: N floating. Returns None for fewer than two windows, which have no spread.
    """
    count = per_window.numel()
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    values = per_window.to(device="cpu", dtype=torch.float64)
    # A few resamples at a time: 2000 × N indices at once would be large for a long text.
    parts = torch.arange(_RESAMPLES).split(max(1, 2**18 // count))
    drawn = (torch.randint(count, (len(part), count), generator=generator) for part in parts)
    means = torch.cat([values[indices].mean(dim=1) for indices in drawn])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
