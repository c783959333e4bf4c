"""Ranks of entries in small groups."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from coprune.base.devices import PerMemory

FEW_GROUPS = PerMemory(host=4096, gpu=65536)
"""Up to this many groups of M, launching operations takes longer than comparing entries, as when a GPU ranks one group per
row of a wide matrix."""
LARGE_GROUP = 16
"""Groups of more entries are sorted."""


def rank_in_groups(grouped: Tensor) -> Tensor:
    """Return each entry's rank in its group, ascending; of equal entries the first ranks lower.

    Args:
        grouped: groups × M float.

    Returns:
        groups × M of some number type, 0 … M − 1 in every group.
    """
    if grouped.shape[1] > LARGE_GROUP:
        return grouped.argsort(dim=1, stable=True).argsort(dim=1)
    return _rank_by_comparisons(grouped)


def _rank_by_comparisons(grouped: Tensor) -> Tensor:
    """Compare every pair of positions for all groups at once, on contiguous planes.

    That is far cheaper than sorting millions of groups of four.
    """
    planes = grouped.T.contiguous()
    if planes.shape[1] <= FEW_GROUPS.on(grouped.device):
        return _rank_at_once(planes).T
    ranks = torch.zeros(planes.shape, dtype=torch.uint8, device=grouped.device)
    for j in range(1, len(planes)):
        for i in range(j):
            above = (planes[i] <= planes[j]).view(torch.uint8)
            ranks[j] += above
            ranks[i] += 1 - above
    return ranks.T


def _rank_at_once(planes: Tensor) -> Tensor:
    """Rank few groups (M × groups) with five operations for all pairs of positions instead of five per pair."""
    before, after, wins, start = _pairs(len(planes), planes.device)
    return torch.addmm(start, wins, (planes[before] <= planes[after]).to(torch.float32))


@cache
def _pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return all pairs of positions i < j, and the matrices by which they determine ranks.

    Returns i and j (pairs int64), wins (M × pairs float32), which is 1 for j and −1 for i of a pair whose entry at i is not
    larger, and start (M × 1), the rank of an entry that beats all after it.
    """
    before, after = torch.triu_indices(size, size, 1, device=device)
    pair = torch.arange(len(before), device=device)
    wins = torch.zeros(size, len(before), dtype=torch.float32, device=device)
    wins[after, pair] = 1
    wins[before, pair] = -1
    return before, after, wins, torch.arange(size - 1, -1, -1, dtype=torch.float32, device=device)[:, None]


_WORTH_A_THREAD = 2**17  # number of scores for which NumPy takes as long as starting a few threads


def by_partition(score: Tensor, position: int) -> Tensor:
    """Select with NumPy, which is vectorised: about forty times as fast as kthvalue on the same core.

    NumPy uses one core, so the rows are divided among torch's threads.
    """
    if score.dtype not in (torch.float32, torch.float64):
        return by_kth_value(score, position)
    threads = min(torch.get_num_threads(), score.shape[0], -(-score.numel() // _WORTH_A_THREAD))
    pieces = [piece.numpy() for piece in score.detach().chunk(max(1, threads))]

    def select(rows: np.ndarray) -> np.ndarray:
        return np.partition(rows, position - 1, axis=1)[:, position - 1].copy()

    if len(pieces) == 1:
        return torch.from_numpy(select(pieces[0]))[:, None]
    with ThreadPoolExecutor(len(pieces)) as pool:
        return torch.from_numpy(np.concatenate([*pool.map(select, pieces)]))[:, None]


def by_kth_value(score: Tensor, position: int) -> Tensor:
    """Select with torch, on any device."""
    return score.kthvalue(position, dim=1, keepdim=True).values
