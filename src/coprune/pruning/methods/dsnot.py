"""DSnoT: swap weights of a finished mask to restore the rows' mean outputs (arXiv 2310.08915).

Each row's expected error is Σ W_ij E[x_j] over its pruned weights. In each cycle a row restores the pruned weight that
lowers this error most for the variance of its input, and drops the least important kept weight that pulls the same way.
No weight changes value, and the number of zeros stays the same (in each group, for N:M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.method_options import require_positive
from coprune.model.walk.statistics import Gram, InputMoments
from coprune.pruning.methods.base import Method, Pruned, apply_keep
from coprune.pruning.methods.magnitude import Magnitude
from coprune.pruning.methods.ria import RIA
from coprune.pruning.methods.wanda import Wanda, wanda_score
from coprune.recipe.pattern import Target

STARTS: dict[str, Method] = {"magnitude": Magnitude(), "wanda": Wanda(), "ria": RIA()}
"""Methods whose masks DSnoT can start from: those that need no richer statistic than its own."""


@dataclass(frozen=True)
class DSnoT:
    """Start from another method's mask and swap within each row.

    Paper: arXiv 2310.08915.
    """

    start: Literal["magnitude", "wanda", "ria"] = "wanda"
    """The method that gives the initial mask."""
    cycles: int = 50
    """Maximum number of swaps per row."""

    statistic: ClassVar[type[InputMoments]] = InputMoments

    def __post_init__(self) -> None:
        require_positive(cycles=self.cycles)

    def prune(self, weight: Tensor, statistic: InputMoments | Gram, target: Target) -> Pruned:
        group = target.pattern.exchange_within() or weight.shape[1]
        keep = STARTS[self.start].prune(weight, statistic, target).keep
        contribution = weight * statistic.mean
        variance = (statistic.mean_square - statistic.mean.square()).clamp_min(1e-12)
        importance = wanda_score(weight, statistic)
        keep = swap_by_mean(keep, contribution, contribution / variance, importance, group, self.cycles)
        return Pruned(apply_keep(weight, keep), keep)


def swap_by_mean(
    keep: Tensor, contribution: Tensor, gain: Tensor, importance: Tensor, group: int, cycles: int
) -> Tensor:
    """Swap one pruned for one kept weight per row and cycle, while that brings the row's mean error closer to zero.

    The authors stop at a fixed error of 0.1, which depends on the activations' scale; here a row stops when its next swap
    would not lower its error.

    Args:
        keep: O × I bool, not modified.
        contribution: O × I float32, W·E[x].
        gain: O × I float32, contribution / variance.
        importance: O × I float32.
        group: number of consecutive inputs within which swaps stay.
        cycles: maximum number of swaps per row.

    Returns:
        O × I bool.
    """
    keep = keep.clone()
    rows, width = keep.shape
    error = contribution.masked_fill(keep, 0).sum(dim=1)
    for _ in range(cycles):
        sign = error.sign()[:, None]
        removable = keep & (sign * contribution < 0)
        partnered = removable.reshape(rows, -1, group).any(dim=2).repeat_interleave(group, dim=1)
        gains = (sign * gain).masked_fill(keep | ~partnered, -torch.inf)
        best_gain, regrown = gains.max(dim=1)
        same_group = torch.arange(width, device=keep.device) // group == (regrown // group)[:, None]
        _, removed = importance.masked_fill(~(removable & same_group), torch.inf).min(dim=1)
        change = _take(contribution, removed) - _take(contribution, regrown)
        accepted = (best_gain > 0) & ((error + change).abs() < error.abs())
        # On a device, idle cycles are cheaper than the read that would let the host stop.
        if in_host_memory(keep.device) and not bool(accepted.any()):
            break
        _put(keep, regrown, _take(keep, regrown) | accepted)
        _put(keep, removed, _take(keep, removed) & ~accepted)
        error += change * accepted
    return keep


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Return values[row, index[row]] for each row."""
    return values.gather(1, index[:, None]).squeeze(1)


def _put(values: Tensor, index: Tensor, value: Tensor) -> None:
    """Set values[row, index[row]] to value[row] for each row."""
    values.scatter_(1, index[:, None], value[:, None])
