"""Permutation of a model's channels for N:M before pruning, which leaves its function unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coprune.base.devices import PerMemory
from coprune.base.errors import BadInput
from coprune.base.processes import ALONE, Processes
from coprune.base.selection import keep_n_of_m
from coprune.base.words import Set, per_cent
from coprune.model.checkpoint.weights import Weights, require_in_memory
from coprune.model.folding import Fold, close
from coprune.model.matrices import Matrix
from coprune.model.proven_folds import known_folds
from coprune.model.walk.block_calls import forward_logits
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.prove import COMPARED_LOGITS
from coprune.model.walk.recording import Dense, Recording
from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.model.walk.walk import Walk
from coprune.pruning.methods.base import Method
from coprune.pruning.methods.ria import RIA, ria_score
from coprune.pruning.methods.wanda import wanda_score
from coprune.recipe.pattern import Pattern


@dataclass
class Permuted:
    """The result of a permutation: the permuted matrices, and the score they retain before and after."""

    before: float = 0.0
    after: float = 0.0
    names: list[str] = field(default_factory=list)
    of: int = 0
    """Number of matrices to prune."""

    def describe(self) -> str:
        """Return the result as one line."""
        if not self.names:
            return "No inputs could be permuted without changing the model, so it was left as it is."
        gained = self.after / self.before - 1 if self.before else 0.0  # all weights may be zero
        return (
            f"Permuted the inputs of {len(self.names)} of {self.of} matrices (the others' inputs come from the residual stream "
            f"or could not be proved permutable): N:M retains {per_cent(gained)} more of their score."
        )


def check_permutable(weights: Weights, pattern: Pattern) -> tuple[int, int]:
    """Return the N and M to permute channels for. Raises BadInput if permuting is pointless or impossible."""
    if pattern.n_of_m is None:
        raise BadInput(
            "permute reorders channels for groups of N:M",
            field="permute",
            fix=("give a pattern of them, such as ", Set("pattern", "2:4")),
        )
    require_in_memory(weights, "permute")
    return pattern.n_of_m


@torch.no_grad()
def permute_model(
    model: ProvenModel,
    recording: Recording,
    method: Method,
    pattern: Pattern,
    processes: Processes = ALONE,
    advance: Callable[[float], None] = lambda blocks: None,
) -> Permuted:
    """Permute input channels in place so that N:M retains more of the score, without changing the model's function.

    If the logits of the sample that proved the model differ by more than rounding, everything is restored.

    Args:
        model: a model in memory.
        recording: calibration batches used here only, since their hidden states advance.
        method: the method to prune with; the score is RIA's for RIA, else Wanda's.
        pattern: N of every M inputs are kept.
        processes: all that measure the model together.
        advance: called with the share of a block just done.

    Returns:
        The permuted matrices and the retained score.

    Raises:
        BadInput: permuting is pointless.
        NumericalError: the activations are not finite.
    """
    n_of_m = check_permutable(model.weights, pattern)
    probe = model.structure.sample
    logits = forward_logits(model.module, probe, COMPARED_LOGITS)
    permuted = Permuted(of=sum(1 for _ in model.chosen.all()))
    folds = known_folds(model)
    done: list[tuple[Fold, list[Tensor]]] = []
    known: dict[str, Statistic] = {}
    inside = replace(model, chosen=replace(model.chosen, outside=[]))
    for event in Walk(inside, recording, InputNorm, Dense(), processes=processes, advance=advance):
        if not isinstance(event, BlockDone):
            known |= event.statistics()
            continue
        score = partial(_score, statistics=known, method=method)
        for fold in folds.get(event.block.name, []):
            if fold.layout.size % n_of_m[1] == 0:
                done.append((fold, _permute(fold, score, n_of_m, permuted)))
        known = {}
    if not close(forward_logits(model.module, probe, COMPARED_LOGITS), logits, len(model.blocks)):
        for fold, orders in reversed(done):
            fold.undo(orders)
        return Permuted(of=permuted.of)
    return permuted


def _permute(
    fold: Fold, score_of: Callable[[Matrix], Tensor], n_of_m: tuple[int, int], permuted: Permuted
) -> list[Tensor]:
    """Find the best orders for one fold and apply them."""
    orders = []
    for consumer in fold.consumers:
        score = score_of(consumer)
        order = torch.stack([permute_channels(part, *n_of_m) for part in fold.layout.scores(score)])
        orders.append(order)
        permuted.before += retained_score(score, *n_of_m)
        permuted.after += retained_score(score[:, fold.layout.columns(order).to(score.device)], *n_of_m)
        permuted.names.append(consumer.name)
    fold.apply(orders)
    return orders


def _score(matrix: Matrix, statistics: Mapping[str, Statistic], method: Method) -> Tensor:
    statistic = statistics.get(matrix.name)
    if statistic is None:
        return matrix.read().abs()
    if isinstance(method, RIA):
        return ria_score(matrix.read(), statistic, method.power)
    return wanda_score(matrix.read(), statistic)


_TILE = PerMemory(host=2**20, gpu=2**26)
"""Number of values compared at a time."""
_GROUPS = 512
"""Number of groups that exchange channels; time grows faster than their square because of the assignment."""


def retained_score(score: Tensor, n: int, m: int) -> float:
    """Return the summed score that N:M keeps. score: O × I float."""
    return float(score[keep_n_of_m(score, n, m)].sum(dtype=torch.float64))


def permute_channels(score: Tensor, n: int, m: int) -> Tensor:
    """Find an order of the input channels in which N:M retains more of the score.

    Each place in the groups is exchanged once. The paper repeats this while it helps, for little more gain at ten times the
    time, and exchanges among all groups, however many there are (LOG.md).

    Args:
        score: O × I float32, not negative.
        n: number kept per group.
        m: size of a group.

    Returns:
        I int64 on the CPU: the channel for each place, so that score[:, order] retains more; the identity if
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
    """Deal channels, largest first, to groups of m: forwards, backwards, forwards … Returns I/m × m int64."""
    descending = totals.argsort(descending=True, stable=True).reshape(m, -1)
    hands = [hand.flip(0) if number % 2 else hand for number, hand in enumerate(descending)]
    return torch.stack(hands, dim=1)


def _exchange(score: Tensor, groups: Tensor, n: int) -> Tensor:
    """Take one channel out of each group and reassign them optimally, for each of the M places in turn.

    Many groups are split into sets of every k-th one, so that each set has strong and weak channels.
    """
    parts = -(-len(groups) // _GROUPS)
    found = groups.clone()
    for first in range(parts):
        _exchange_among(score, found[first::parts], n)
    return found


def _exchange_among(score: Tensor, groups: Tensor, n: int) -> None:
    """Exchange channels among these groups, in place."""
    for place in range(groups.shape[1]):
        others = torch.cat([groups[:, :place], groups[:, place + 1 :]], dim=1)
        value = _values(score, groups[:, place].to(score.device), others.to(score.device), n)
        _, chosen = linear_sum_assignment(value.T.cpu().numpy(), maximize=True)
        groups[:, place] = groups[torch.from_numpy(chosen), place]


def _values(score: Tensor, channels: Tensor, others: Tensor, n: int) -> Tensor:
    """Return the score that a group retains with a channel added, up to a constant per group.

    channels: C; others: G × (M − 1), the channels that stay in each group. Returns C × G. In each row the group keeps its
    n − 1 best others in any case, then the better of the next one and the channel. The constant does not matter, since
    every group gets one channel.
    """
    rows = score.shape[0]
    rest = score[:, others.reshape(-1)].reshape(rows, *others.shape)
    threshold = rest.topk(n, dim=2).values[:, :, -1].T.contiguous()
    added = score[:, channels].T.contiguous()
    return summed_maxima(added, threshold)


def summed_maxima(first: Tensor, second: Tensor) -> Tensor:
    """Return Σᵢ max(aᵢ, bᵢ) of every row a of one matrix and b of the other: A × n and B × n float, gives A × B.

    Tiles stay in the cache; torch.cdist, whose L1 distances would do, takes four times as long on a CPU.
    """
    side = max(1, math.isqrt(_TILE.on(first.device) // first.shape[1]))
    sums = [
        torch.cat([torch.maximum(some[:, None], other).sum(dim=2) for other in second.split(side)], dim=1)
        for some in first.split(side)
    ]
    return torch.cat(sums)
