"""Choosing which weights of a matrix to keep, by their scores.

A score is float, out × in, and larger means more important. A mask is boolean and True where a weight is kept. Ties are
resolved alike everywhere: of equal scores the one with the lower index is pruned first, as in a stable ascending sort.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput, NumericalError
from coprune.base.kernels.kernel_table import kernel
from coprune.base.kernels.ranks import rank_in_groups
from coprune.base.reading import refuse_if


def refuse_nan(score: Tensor) -> None:
    """Raise NumericalError if a score is NaN."""
    refuse_if(torch.isnan(score).any(), NumericalError("the scores hold NaN"))


def count_pruned(size: int, sparsity: float) -> int:
    """Return floor(sparsity · size), robust to binary fractions (0.29 · 100 is 28.999… in floating point)."""
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
        pruned: number of entries to prune per row.

    Returns:
        O × I bool.
    """
    if pruned <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = kernel("find_smallest", score.device)(score, pruned)
    keep: Tensor = score > threshold
    tied = score == threshold
    # Of the entries at the threshold, prune only those still needed after the strictly smaller ones.
    quota = pruned - (score < threshold).sum(dim=1, keepdim=True)
    # On a device an empty addition is cheaper than a read that would avoid it.
    if not in_host_memory(score.device) or bool((tied.sum(dim=1, keepdim=True) > quota).any()):
        dtype = torch.int32 if score.shape[1] < 2**31 else torch.int64
        keep |= tied & (tied.cumsum(dim=1, dtype=dtype) > quota)
    return keep


def keep_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the N largest of every M consecutive entries of a row.

    Args:
        score: O × I float.
        n: number to keep per group.
        m: size of a group.

    Returns:
        O × I bool.

    Raises:
        BadInput: M does not divide I.
    """
    rows, width = score.shape
    if width % m:
        raise BadInput(f"pattern {n}:{m} does not divide a width of {width} inputs", field="pattern", value=f"{n}:{m}")
    return (rank_in_groups(score.reshape(-1, m)) >= m - n).reshape(rows, width)


def most_kept(keep: Tensor, group: int) -> int:
    """Return the maximum number of kept weights in any group of inputs. keep: O × I bool; the group's size divides I."""
    return int(keep.reshape(keep.shape[0], -1, group).sum(dim=2).max())


def tightest_groups(keep: Tensor, sizes: Iterable[int], slack: float) -> tuple[int, int] | None:
    """Find the N and M for which a mask keeps at most N of every M consecutive inputs, and hardly fewer than N.

    Args:
        keep: O × I bool.
        sizes: values of M to try, ascending.
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
