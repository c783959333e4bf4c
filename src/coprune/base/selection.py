"""Choosing which weights of a matrix to keep, by their scores.

A score is float, out × in, and larger means more important. A mask is boolean and True where a weight is kept. Ties go
the same way everywhere: of equal scores the one with the lower index is pruned first, as a stable ascending sort would
have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError

FEW_GROUPS = 4096
"""Up to so many groups of M, comparing their entries takes less time than telling the machine to."""


def refuse_nan(score: Tensor) -> None:
    """Raise NumericalError if a score is NaN."""
    if bool(torch.isnan(score).any()):
        raise NumericalError("the scores hold NaN")


def count_pruned(size: int, sparsity: float) -> int:
    """floor(sparsity · size), not misled by binary fractions (0.29 · 100 is 28.999… in floating point)."""
    return int(size * sparsity + 1e-6)


def keep_share(score: Tensor, sparsity: float, by_row: bool) -> Tensor:
    """Prune the smallest scores of every row, or of the whole matrix.

    Args:
        score: O × I float.
        sparsity: the fraction to prune, 0 ≤ s < 1.
        by_row: whether the weights of a row compete with each other only.

    Returns:
        O × I bool, with exactly floor(s·I) zeros in every row, or floor(s·O·I) in all.
    """
    if by_row:
        return keep_largest(score, count_pruned(score.shape[1], sparsity))
    return keep_largest(score.reshape(1, -1), count_pruned(score.numel(), sparsity)).view_as(score)


def keep_largest(score: Tensor, pruned: int) -> Tensor:
    """Prune the `pruned` smallest entries of every row, the lower index first where scores are equal.

    A selection, not a sort.

    Args:
        score: O × I float.
        pruned: how many entries of each row to prune.

    Returns:
        O × I bool.
    """
    if pruned <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _smallest(score, pruned)
    keep = score > threshold
    tied = score == threshold
    # Of the entries at the threshold only so many are pruned as the strictly smaller ones leave to prune.
    quota = pruned - (score < threshold).sum(dim=1, keepdim=True)
    if bool((tied.sum(dim=1, keepdim=True) > quota).any()):
        keep |= tied & (tied.cumsum(dim=1) > quota)
    return keep


def keep_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the N largest of every M consecutive entries of a row.

    Args:
        score: O × I float.
        n: how many to keep of each group.
        m: size of a group.

    Returns:
        O × I bool.

    Raises:
        BadInput: M does not divide I.
    """
    rows, width = score.shape
    if width % m:
        raise BadInput(f"pattern {n}:{m} does not divide a width of {width} inputs.")
    grouped = score.reshape(-1, m)
    if m > 16:
        rank = grouped.argsort(dim=1, stable=True).argsort(dim=1)
    else:
        rank = _rank_by_comparisons(grouped)
    return (rank >= m - n).reshape(rows, width)


def most_kept(keep: Tensor, group: int) -> int:
    """The most weights that any group of consecutive inputs keeps. keep: O × I bool, the group's size divides I."""
    return int(keep.reshape(keep.shape[0], -1, group).sum(dim=2).max())


def tightest_groups(keep: Tensor, sizes: Iterable[int], slack: float) -> tuple[int, int] | None:
    """Find the N and M for which a mask keeps at most N of every M consecutive inputs, and hardly fewer than N.

    Args:
        keep: O × I bool.
        sizes: which M to try, ascending.
        slack: share of the weights that may be missing from the groups; small unstructured matrices follow some N:M
            by chance, but with many groups that hold fewer than N.

    Returns:
        N and M with the smallest share N/M, of equal ones those with the smallest M; None if there are none.
    """
    best: tuple[int, int] | None = None
    kept = float(keep.to(torch.float32).mean())
    for size in sizes:
        if keep.shape[1] % size:
            continue
        most = most_kept(keep, size)
        tight = most / size - kept < slack
        if 0 < most < size and tight and (best is None or most * best[1] < best[0] * size):
            best = (most, size)
    return best


def _smallest(score: Tensor, position: int) -> Tensor:
    """The position-th smallest value of every row, O × 1."""
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64):
        # NumPy's selection is vectorised: about forty times as fast as kthvalue on the same core.
        found = np.partition(score.detach().numpy(), position - 1, axis=1)[:, position - 1]
        return torch.from_numpy(found.copy())[:, None]
    return score.kthvalue(position, dim=1, keepdim=True).values


def _rank_by_comparisons(grouped: Tensor) -> Tensor:
    """How many of its group an entry beats (of equals, those before it). grouped: groups × M; returns the same.

    Every pair of positions is compared for all groups at once, on contiguous planes: far cheaper than sorting
    millions of groups of four.
    """
    planes = grouped.T.contiguous()
    if planes.shape[1] <= FEW_GROUPS:
        return _rank_at_once(planes).T
    ranks = torch.zeros(planes.shape, dtype=torch.uint8, device=grouped.device)
    for j in range(1, len(planes)):
        for i in range(j):
            above = (planes[i] <= planes[j]).view(torch.uint8)
            ranks[j] += above
            ranks[i] += 1 - above
    return ranks.T


def _rank_at_once(planes: Tensor) -> Tensor:
    """The same for few groups (M × groups): all pairs of positions in five operations instead of five for each pair."""
    before, after, wins, start = _pairs(len(planes), planes.device)
    return torch.addmm(start, wins, (planes[before] <= planes[after]).to(torch.float32))


@cache
def _pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of positions i < j, and how they decide ranks: wins (M × pairs float32) is 1 for j and −1 for i, to be
    added to start (M × 1: every entry beats those after it) where the entry at i is not larger."""
    before, after = torch.triu_indices(size, size, 1, device=device)
    pair = torch.arange(len(before), device=device)
    wins = torch.zeros(size, len(before), dtype=torch.float32, device=device)
    wins[after, pair] = 1
    wins[before, pair] = -1
    return before, after, wins, torch.arange(size - 1, -1, -1, dtype=torch.float32, device=device)[:, None]
