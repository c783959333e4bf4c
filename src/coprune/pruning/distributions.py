"""Histograms of a matrix as it is pruned: weight magnitudes, input norms, Wanda scores.

All are over the decimal logarithm, since the values span orders of magnitude. Weights and scores are counted on a sample
of rows, so the cost does not depend on the matrix's size; input norms are all counted.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from coprune.base.reading import to_host

TITLES = {
    "magnitude": "log₁₀ |weight|",
    "norm": "log₁₀ input norm (RMS per channel)",
    "score": "log₁₀ |weight| · input norm",
}
"""What is counted, by the names in `Distributions`."""
BINS = 32
SAMPLED_WEIGHTS = 2**16


class Histogram(BaseModel):
    """Counts in equal bins of log₁₀ between low and high; zeros are not counted."""

    model_config = ConfigDict(frozen=True)

    low: float
    high: float
    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    """Empty if nothing is pruned, as for input norms."""


class Distributions(BaseModel):
    """Distributions of a matrix W (O × I) with input norms n: of the magnitudes |W|, the norms n, and the scores |W|·n."""

    model_config = ConfigDict(frozen=True)

    magnitude: Histogram | None
    norm: Histogram | None
    score: Histogram | None


def distributions_of(weight: Tensor, keep: Tensor, norm: Tensor | None) -> Distributions:
    """Count a matrix's magnitudes, norms and scores.

    Args:
        weight: O × I float32, before pruning.
        keep: O × I bool, True where a weight is kept.
        norm: I, root mean square of every input channel, or None if no input was seen.

    Returns:
        Histograms, None where all values are zero.
    """
    magnitude, kept = to_host(*sampled(weight, keep))
    assert magnitude is not None
    assert kept is not None
    return distributions_in_host_memory(magnitude, kept, *to_host(norm))


def sampled(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the magnitudes of a sample of a matrix's rows, and their mask of kept weights."""
    step = max(1, -(-weight.numel() // SAMPLED_WEIGHTS))
    return weight[::step].abs(), keep[::step]


def distributions_in_host_memory(magnitude: Tensor, kept: Tensor, norm: Tensor | None) -> Distributions:
    """Return `distributions_of` the values from `sampled`."""
    return Distributions(
        magnitude=histogram(magnitude, kept),
        norm=None if norm is None else histogram(norm, None),
        score=None if norm is None else histogram(magnitude * norm, kept),
    )


def histogram(values: Tensor, keep: Tensor | None) -> Histogram | None:
    """Count values ≥ 0 by their decimal logarithm, kept and pruned ones separately.

    Args:
        values: any shape, floating.
        keep: bool, of the same shape, or None if all are.

    Returns:
        None if no value is above zero.
    """
    there = values > 0
    if not bool(there.all()):  # rare, and selecting takes longer than counting
        values, keep = values[there], None if keep is None else keep[there]
    if not values.numel():
        return None
    logarithms = values.to(torch.float32).log10().reshape(-1)
    low, high = (float(end) for end in logarithms.aminmax())
    high = max(high, low + 1e-3)  # a single value still needs a bin of some width
    bins = ((logarithms - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
    if keep is None:
        return Histogram(low=low, high=high, kept=tuple(torch.bincount(bins, minlength=BINS).tolist()), pruned=())
    # Kept values are counted in separate bins after the others, in one pass.
    counts = torch.bincount(bins.add_(keep.reshape(-1), alpha=BINS), minlength=2 * BINS).tolist()
    return Histogram(low=low, high=high, kept=tuple(counts[BINS:]), pruned=tuple(counts[:BINS]))
