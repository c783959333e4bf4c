"""Channel permutation for N:M: put input channels into groups so that less of the score has to be pruned.

N:M keeps N of every M consecutive inputs whatever they are worth; where four strong channels stand together, half of
them fall. RIA (Plug-and-Play, ICLR 2024, OpenReview Tr0lPx9woF) sorts the channels by their total score, deals them
serpentine over the groups, and then exchanges one channel of every group at a time by linear sum assignment.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coprune.base.devices import PerMemory
from coprune.base.errors import BadInput
from coprune.base.selection import keep_n_of_m

_TILE = PerMemory(host=2**20, gpu=2**26)
"""Numbers that are compared at a time."""
_GROUPS = 512
"""Groups that exchange channels with each other: time grows with their square, with that of an assignment still faster."""


def retained_score(score: Tensor, n: int, m: int) -> float:
    """The summed score of what N:M keeps. score: O × I float."""
    return float(score[keep_n_of_m(score, n, m)].sum(dtype=torch.float64))


def permute_channels(score: Tensor, n: int, m: int) -> Tensor:
    """Find an order of the input channels in which N:M retains more of the score.

    Every place of the groups is exchanged once. The paper goes on while it helps, in ten times the time, for a tenth of what
    this gains; and it exchanges among all groups, however many there are (LOG.md).

    Args:
        score: O × I float32, not negative.
        n: how many of a group are kept.
        m: size of a group.

    Returns:
        I int64 on the CPU: which channel comes to each place, such that score[:, order] retains the most; the identity if
        nothing better is found.

    Raises:
        BadInput: M does not divide I.
    """
    width = score.shape[1]
    if width % m:
        raise BadInput(f"pattern {n}:{m} does not divide a width of {width} inputs", field="pattern", value=f"{n}:{m}")
    groups = deal_serpentine(score.sum(dim=0, dtype=torch.float64).cpu(), m)
    order = _exchange(score, groups, n).reshape(-1)
    better = retained_score(score[:, order.to(score.device)], n, m) > retained_score(score, n, m)
    return order if better else torch.arange(width)


def deal_serpentine(totals: Tensor, m: int) -> Tensor:
    """Deal channels, the greatest first, over groups of m: forwards, backwards, forwards … Returns I/m × m int64."""
    descending = totals.argsort(descending=True, stable=True).reshape(m, -1)
    hands = [hand.flip(0) if number % 2 else hand for number, hand in enumerate(descending)]
    return torch.stack(hands, dim=1)


def _exchange(score: Tensor, groups: Tensor, n: int) -> Tensor:
    """Take one channel out of every group and put them back in the best way, for each of the M places in turn.

    Where there are many groups, each exchanges with every k-th one, so that strong and weak channels are among all of them.
    """
    parts = -(-len(groups) // _GROUPS)
    found = groups.clone()
    for first in range(parts):
        _exchange_among(score, found[first::parts], n)
    return found


def _exchange_among(score: Tensor, groups: Tensor, n: int) -> None:
    """The same among all of these groups, in place."""
    for place in range(groups.shape[1]):
        others = torch.cat([groups[:, :place], groups[:, place + 1 :]], dim=1)
        value = _values(score, groups[:, place].to(score.device), others.to(score.device), n)
        _, chosen = linear_sum_assignment(value.T.cpu().numpy(), maximize=True)
        groups[:, place] = groups[torch.from_numpy(chosen), place]


def _values(score: Tensor, channels: Tensor, others: Tensor, n: int) -> Tensor:
    """What a group retains with a channel added, up to a constant of the group.

    channels: C; others: G × (M − 1), the channels that stay in each group. Returns C × G. Of a row, the group keeps its
    n − 1 best others in any case, and then the better of the next one and the channel. The constant does not matter,
    since every group gets one channel.
    """
    rows = score.shape[0]
    rest = score[:, others.reshape(-1)].reshape(rows, *others.shape)
    threshold = rest.topk(n, dim=2).values[:, :, -1].T.contiguous()
    added = score[:, channels].T.contiguous()
    return summed_maxima(added, threshold)


def summed_maxima(first: Tensor, second: Tensor) -> Tensor:
    """Σᵢ max(aᵢ, bᵢ) of every row a of one and b of the other: A × n and B × n float, gives A × B.

    In tiles that stay in the cache: torch.cdist, from whose L1 distances they follow, takes four times as long on a CPU.
    """
    side = max(1, math.isqrt(_TILE.on(first.device) // first.shape[1]))
    sums = [
        torch.cat([torch.maximum(some[:, None], other).sum(dim=2) for other in second.split(side)], dim=1)
        for some in first.split(side)
    ]
    return torch.cat(sums)
