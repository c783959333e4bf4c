"""Wanda's variant: each row may lose the same share of its total score (appendix of arXiv 2306.11695).

Rows whose score sits in few weights lose more of them. One share α serves the whole matrix and is found by bisection,
so that the matrix (not each row) comes out at the sparsity asked for. For N:M this is plain Wanda, as in the
authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coprune.base.selection import count_pruned, refuse_nan
from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.pruning.methods.base import Pruned, apply_keep
from coprune.pruning.methods.wanda import wanda_score
from coprune.recipe.pattern import Target

TOLERANCE = 0.001
"""How near the sparsity has to come, and how short the interval of α may become (the authors' values)."""


@dataclass(frozen=True)
class WandaVariant:
    """Prune in each row the smallest scores that add up to the share α of the row's total.

    Paper: appendix of arXiv 2306.11695.
    """

    statistic: ClassVar[type[Statistic]] = InputNorm

    def prune(self, weight: Tensor, statistic: Statistic, target: Target) -> Pruned:
        score = wanda_score(weight, statistic)
        if target.pattern.group_size is not None or target.sparsity == 0:
            keep = target.keep(score, "row")
            return Pruned(apply_keep(weight, keep), keep)
        refuse_nan(score)
        ascending, order = score.sort(dim=1, stable=True)
        counts = bisect_share(ascending, score.sum(dim=1, keepdim=True), target.sparsity)
        position = torch.arange(score.shape[1], device=score.device)
        keep = torch.empty_like(score, dtype=torch.bool).scatter_(1, order, position >= counts)
        reached = float(counts.sum()) / score.numel()
        events: tuple[str, ...] = ()
        if abs(reached - target.sparsity) > TOLERANCE:
            events = (f"wanda_variant reached a sparsity of {reached:.4f} where {target.sparsity:.4f} was asked for",)
        return Pruned(apply_keep(weight, keep), keep, events)


def bisect_share(ascending: Tensor, total: Tensor, sparsity: float) -> Tensor:
    """Find how many weights each row loses under the one share α that gives the sparsity.

    α is searched in [0, 0.8] from 0.4 on. A row in which nothing qualifies loses nothing (the published code prunes all of
    it). A row whose scores are all zero, of which no share means anything, loses what the sparsity says of it.

    Args:
        ascending: O × I, each row's scores sorted.
        total: O × 1, their sum.
        sparsity: of the matrix.

    Returns:
        O × 1 int64.
    """
    cumulative = ascending.cumsum(dim=1)
    low, high, share = 0.0, 0.8, 0.4
    none, meant = total == 0, count_pruned(ascending.shape[1], sparsity)
    while True:
        counts = torch.searchsorted(cumulative, total * share, right=True).masked_fill(none, meant)
        reached = float(counts.sum()) / ascending.numel()
        if abs(reached - sparsity) <= TOLERANCE or high - low < TOLERANCE:
            return counts
        if reached > sparsity:
            high = share
        else:
            low = share
        share = (low + high) / 2
