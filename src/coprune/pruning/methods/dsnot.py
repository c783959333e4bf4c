"""DSnoT: swap weights of a finished mask until the rows' mean outputs are right again (arXiv 2310.08915).

Each row's expected error is Σ W_ij E[x_j] over its pruned weights. In every cycle a row takes back the pruned weight
that lowers this error most for the variance of its input, and gives up the least important kept weight that pulls the
same way. No weight is changed, and the number of zeros stays what it was (in each group, for N:M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.options import require_positive
from coprune.model.walk.statistics import Gram, InputMoments
from coprune.pruning.methods.base import Method, Pruned, apply_keep
from coprune.pruning.methods.magnitude import Magnitude
from coprune.pruning.methods.ria import RIA
from coprune.pruning.methods.wanda import Wanda, wanda_score
from coprune.recipe.pattern import Target

STARTS: dict[str, Method] = {"magnitude": Magnitude(), "wanda": Wanda(), "ria": RIA()}
"""The methods whose masks DSnoT can begin from: those that need no more than it does itself."""


@dataclass(frozen=True)
class DSnoT:
    """Begin with another method's mask and swap within each row.

    Paper: arXiv 2310.08915.
    """

    start: Literal["magnitude", "wanda", "ria"] = "wanda"
    """The method whose mask it begins from."""
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
    """Swap one pruned for one kept weight per row and cycle, while that brings the row's mean error nearer to zero.

    The authors stop at a fixed error of 0.1, which depends on the activations' scale; here a row stops when no swap that it
    would choose lowers its error.

    Args:
        keep: O × I bool, not modified.
        contribution: O × I float32, W·E[x].
        gain: O × I float32, contribution / variance.
        importance: O × I float32.
        group: how many consecutive inputs a swap stays within.
        cycles: swaps of a row at most.

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
        # On a device idle cycles are cheaper than a read that would tell the host to stop.
        if in_host_memory(keep.device) and not bool(accepted.any()):
            break
        _put(keep, regrown, _take(keep, regrown) | accepted)
        _put(keep, removed, _take(keep, removed) & ~accepted)
        error += change * accepted
    return keep


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Return values[row, index[row]] for every row."""
    return values.gather(1, index[:, None]).squeeze(1)


def _put(values: Tensor, index: Tensor, value: Tensor) -> None:
    """Set values[row, index[row]] to value[row] for every row."""
    values.scatter_(1, index[:, None], value[:, None])
