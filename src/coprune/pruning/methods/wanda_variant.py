"""Wanda's variant: each row may lose the same share of its total score (appendix of arXiv 2306.11695).

Rows whose score sits in few weights lose more of them. A single share α for the whole matrix is found by bisection, so
that the matrix (not each row) reaches the requested sparsity. For N:M this is plain Wanda, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.selection import count_pruned, refuse_nan
from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.pruning.methods.base import Pruned, apply_keep
from coprune.pruning.methods.wanda import wanda_score
from coprune.pruning.solver_events import Event
from coprune.recipe.pattern import Target

TOLERANCE = 0.001
"""Tolerance of the sparsity, and shortest interval of α (the authors' values)."""
HIGHEST = 0.8
"""Upper end of the search for α, which starts at 0."""


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
        counts, reached = bisect_share(ascending, score.sum(dim=1, keepdim=True), target.sparsity)
        position = torch.arange(score.shape[1], device=score.device)
        keep = torch.empty_like(score, dtype=torch.bool).scatter_(1, order, position >= counts)
        events: tuple[Event, ...] = ()
        if abs(reached - target.sparsity) > TOLERANCE:
            events = (Event(kind="sparsity missed", figures={"reached": reached, "asked": target.sparsity}),)
        return Pruned(apply_keep(weight, keep), keep, events)


def bisect_share(ascending: Tensor, total: Tensor, sparsity: float) -> tuple[Tensor, float]:
    """Find how many weights each row loses at the share α that gives the sparsity.

    α is searched in [0, 0.8], starting at 0.4. A row in which nothing qualifies loses nothing (the published code prunes all
    of it). A row of zero scores, for which no share means anything, loses the matrix's sparsity. On a device all α that the
    search may reach are evaluated at once, since the host would wait for each.

    Args:
        ascending: O × I, each row's scores sorted.
        total: O × 1, their sum.
        sparsity: of the matrix.

    Returns:
        O × 1 int, and the resulting sparsity.
    """
    cumulative = ascending.cumsum(dim=1)
    none, meant = total == 0, count_pruned(ascending.shape[1], sparsity)

    def lost(shares: Tensor | float) -> Tensor:
        return torch.searchsorted(cumulative, total * shares, right=True).masked_fill(none, meant)

    known: dict[float, float] = {}
    if not in_host_memory(ascending.device):
        shares = possible_shares()
        given = torch.tensor(shares, dtype=total.dtype).to(total.device, non_blocking=True)
        known = dict(zip(shares, lost(given).sum(dim=0).tolist(), strict=True))
    low, high, share = 0.0, HIGHEST, HIGHEST / 2
    while True:
        counts = None if known else lost(share)
        reached = (known[share] if counts is None else float(counts.sum())) / ascending.numel()
        if abs(reached - sparsity) <= TOLERANCE or high - low < TOLERANCE:
            return lost(share) if counts is None else counts, reached
        low, high = (low, share) if reached > sparsity else (share, high)
        share = (low + high) / 2


def possible_shares() -> list[float]:
    """Return every α that the bisection may reach, down to the shortest interval."""
    found, intervals = [], [(0.0, HIGHEST)]
    while intervals:
        halves = [(low, (low + high) / 2, high) for low, high in intervals]
        found += [share for _, share, _ in halves]
        intervals = [
            ends for low, share, high in halves for ends in ((low, share), (share, high)) if high - low >= TOLERANCE
        ]
    return found
