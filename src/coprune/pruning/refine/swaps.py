"""SparseSwaps: exchange a pruned for a kept weight of the same row while the layer error falls (arXiv 2512.10922).

With Δ = W − Ŵ and r = ΔG, a row's error is ΔGΔᵀ. Restoring the pruned weight i to its dense value removes Δ_i; dropping
the kept weight j adds Ŵ_j to Δ_j. The change of Δ is c = Ŵ_j e_j − Δ_i e_i, and that of the error 2c·r + cGcᵀ:

    (Δ_i² G_ii − 2Δ_i r_i)  +  (Ŵ_j² G_jj + 2Ŵ_j r_j)  −  2 Δ_i Ŵ_j G_ij
     restoring i                dropping j                 their interaction

(Without a weight update Δ_i is W_i and Ŵ_j is W_j, which gives the paper's formula.)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.method_options import require_not_negative, require_positive
from coprune.base.precision import full_float32
from coprune.base.reading import Questions
from coprune.model.walk.statistics import Gram
from coprune.pruning.masked_fit import Rounds, damp_diagonal, rows_improved, solve_masked
from coprune.pruning.methods.base import Pruned, apply_keep
from coprune.recipe.pattern import Target

BLOCK = 128
"""Columns whose residual is computed in one product (N:M)."""

NOISE = 1e-5
"""A swap must lower the error by more than this share of its terms; less may be rounding."""


@dataclass(frozen=True)
class Swaps:
    """Swap within rows (for N:M within groups) while that helps, then refit.

    Paper: SparseSwaps, arXiv 2512.10922.
    """

    steps: int = 100
    """Maximum number of swaps per row (unstructured) or of sweeps over all groups (N:M)."""
    candidates: int = 16
    """Unstructured: number of the cheapest weights to restore and to drop that are paired."""
    refit_rounds: int = 20
    """Conjugate-gradient rounds afterwards; 0 leaves the weights alone."""
    damping: float = 0.01
    """Added to each diagonal entry of the Gram matrix, as a fraction of it."""

    def __post_init__(self) -> None:
        require_positive(steps=self.steps, candidates=self.candidates)
        require_not_negative(refit_rounds=self.refit_rounds, damping=self.damping)

    def refine(self, weight: Tensor, pruned: Pruned, statistic: Gram, target: Target) -> Pruned:
        group = target.pattern.exchange_within()
        with full_float32():
            dense, gram = weight.to(torch.float32), statistic.gram
            damped = damp_diagonal(gram, self.damping)
            if group is not None:
                swapped, keep = swap_in_groups(dense, pruned, damped, group, self.steps)
            else:
                swapped, keep = swap_in_rows(dense, pruned, damped, self.candidates, self.steps)
            if self.refit_rounds:
                swapped = solve_masked(dense, swapped, keep, damped, Rounds(self.refit_rounds))
            improved = rows_improved(dense, pruned.weight, swapped, gram)
        return pruned._replace(
            weight=torch.where(improved, swapped, pruned.weight), keep=torch.where(improved, keep, pruned.keep)
        )


def restoring_costs(delta: Tensor, residual: Tensor, diagonal: Tensor) -> Tensor:
    """Return the change of the error from setting Δ to zero in one place: Δ²G_ii − 2Δr."""
    return delta * (delta * diagonal - 2 * residual)


def dropping_costs(current: Tensor, residual: Tensor, diagonal: Tensor) -> Tensor:
    """Return the change of the error from setting Ŵ to zero in one place: Ŵ²G_jj + 2Ŵr."""
    return current * (current * diagonal + 2 * residual)


def swap_in_rows(weight: Tensor, pruned: Pruned, gram: Tensor, candidates: int, steps: int) -> tuple[Tensor, Tensor]:
    """Make the best swap in each row repeatedly; rows without a gain drop out (on a device they stay).

    The best pair is searched among the `candidates` cheapest to restore and the `candidates` cheapest to drop (or all, if
    there are fewer); a pair's interaction is exact.

    Args:
        weight: O × I float32, dense.
        pruned: the pruned matrix.
        gram: I × I float32.
        candidates: number of each kind to pair.
        steps: maximum number of swaps per row.

    Returns:
        The weight (O × I float32) and its mask.
    """
    delta = weight - pruned.weight
    keep = pruned.keep.clone()
    residual = delta @ gram
    diagonal = gram.diagonal()
    count = min(candidates, weight.shape[1])
    rows = torch.arange(weight.shape[0], device=weight.device)
    over: Questions[bool] = Questions()
    for _ in range(steps):
        current = weight[rows] - delta[rows]
        restore = restoring_costs(delta[rows], residual[rows], diagonal).masked_fill(keep[rows], torch.inf)
        drop = dropping_costs(current, residual[rows], diagonal).masked_fill(~keep[rows], torch.inf)
        restore_cost, i = restore.topk(count, dim=1, largest=False)
        drop_cost, j = drop.topk(count, dim=1, largest=False)
        restored, dropped = delta[rows[:, None], i], current.gather(1, j)
        pairs = restore_cost[:, :, None] + drop_cost[:, None, :]
        pairs -= 2 * restored[:, :, None] * dropped[:, None, :] * gram[i[:, :, None], j[:, None, :]]
        change, best = pairs.flatten(1).min(dim=1)
        at_i, at_j = (best // count)[:, None], (best % count)[:, None]
        size = restore_cost.gather(1, at_i).abs() + drop_cost.gather(1, at_j).abs()
        gained = change < -NOISE * size.squeeze(1)
        if over.ask(~gained.any(), True):
            break
        i, j = i.gather(1, at_i), j.gather(1, at_j)
        swap = _Swap(rows, i, j, restored.gather(1, at_i), dropped.gather(1, at_j), gained[:, None])
        if in_host_memory(weight.device):
            left = gained.nonzero().squeeze(1)
            swap = _Swap(*(part[left] for part in swap))
            rows = swap.rows
        _exchange(swap, weight, delta, keep, residual, gram)
    return apply_keep(weight - delta, keep), keep


class _Swap(NamedTuple):
    """One swap for each of R rows, each field R × 1 (rows: R), and whether it is made."""

    rows: Tensor
    i: Tensor
    j: Tensor
    restored: Tensor
    dropped: Tensor
    made: Tensor


def _exchange(swap: _Swap, weight: Tensor, delta: Tensor, keep: Tensor, residual: Tensor, gram: Tensor) -> None:
    """Make the swaps, in place."""
    rows, i, j, restored, dropped, made = swap
    here = rows[:, None]
    change = (dropped * made) * gram[j.squeeze(1)] - (restored * made) * gram[i.squeeze(1)]
    residual[rows] += change
    delta[here, i] = restored.masked_fill(made, 0.0)
    delta[here, j] = torch.where(made, weight[here, j], delta[here, j])
    keep[here, i] |= made
    keep[here, j] &= ~made


def swap_in_groups(weight: Tensor, pruned: Pruned, gram: Tensor, group: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Sweep over groups of columns; make each row's best swap in each group while any row gains.

    Swaps in different groups change each other's costs, so the residual is kept up to date: within a block of columns at
    once, between blocks by one product per block. It ends where the published order (a row's best group first) ends: when no
    group of any row has a swap that helps.

    Args:
        weight: O × I float32, dense.
        pruned: the pruned matrix.
        gram: I × I float32.
        group: number of columns per group.
        sweeps: maximum number of sweeps over all groups.

    Returns:
        The weight (O × I float32) and its mask.
    """
    # Transposed, so that a group of columns is contiguous in memory.
    dense = weight.T.contiguous()
    delta = dense - pruned.weight.T
    keep = pruned.keep.T.clone(memory_format=torch.contiguous_format)  # contiguous() would alias a single row
    width = dense.shape[0]
    block_size = max(BLOCK // group, 1) * group
    over: Questions[bool] = Questions()
    starts = range(0, width, block_size)
    changes: deque[Tensor] = deque(maxlen=len(starts))
    for start in [*starts] * sweeps:
        block = range(start, min(start + block_size, width), group)
        changes.append(_swap_in_block(dense, delta, keep, gram, block))
        # Nothing has changed since this block was last visited, so nothing will.
        if len(changes) == len(starts) and over.ask(~torch.stack([*changes]).any(), True):
            break
    keep = keep.T.contiguous()
    return apply_keep(weight - delta.T, keep), keep


def _swap_in_block(dense: Tensor, delta: Tensor, keep: Tensor, gram: Tensor, firsts: range) -> Tensor:
    """Make each row's best swap in each group of a block, in place; all I × O, gram I × I, firsts: the groups' first columns.

    Returns whether there was any, a scalar bool.
    """
    block = slice(firsts.start, firsts.stop)
    residual = gram[block] @ delta
    changed = torch.zeros((), dtype=torch.bool, device=delta.device)
    for first in firsts:
        columns = slice(first, first + firsts.step)
        here = slice(first - block.start, columns.stop - block.start)
        change = _swap_one_group(dense[columns], delta[columns], keep[columns], residual[here], gram[columns, columns])
        if change is not None:
            residual.addmm_(gram[block, columns], change)
            changed = changed | change.any()
    return changed


def _swap_one_group(dense: Tensor, delta: Tensor, keep: Tensor, residual: Tensor, gram: Tensor) -> Tensor | None:
    """Make each row's best swap in one group, in place; all M × O, gram M × M.

    Returns the change of Δ; in host memory, None if there is none.
    """
    size, rows = delta.shape
    diagonal = gram.diagonal()[:, None]
    current = dense - delta
    restore = restoring_costs(delta, residual, diagonal).masked_fill(keep, torch.inf)
    drop = dropping_costs(current, residual, diagonal).masked_fill(~keep, torch.inf)
    pairs = restore[:, None] + drop[None] - 2 * gram[:, :, None] * delta[:, None] * current[None]
    change, best = pairs.view(size * size, rows).min(dim=0)
    i, j = (best // size)[None], (best % size)[None]
    gained = change < -NOISE * (restore.gather(0, i).abs() + drop.gather(0, j).abs()).squeeze(0)
    if in_host_memory(dense.device) and not bool(gained.any()):
        return None
    moved = torch.zeros_like(delta)
    moved.scatter_(0, i, -delta.gather(0, i) * gained)
    moved.scatter_(0, j, current.gather(0, j) * gained)
    delta += moved
    keep.scatter_(0, i, keep.gather(0, i) | gained)
    keep.scatter_(0, j, keep.gather(0, j) & ~gained)
    return moved
