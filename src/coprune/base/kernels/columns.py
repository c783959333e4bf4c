"""The operation `walk_columns`: SparseGPT's update of one block of a weight's columns (arXiv 2301.00774).

A column holds the weights of one input to all O outputs; a block is C consecutive columns. With U the upper factor of the
inverse Hessian, zeroing the weight w in column j is compensated best by subtracting w · U_jk / U_jj from every later column k
of its row. So, for the columns of a block in order:

    w_j  −=  Σ_{i<j} e_i · unit_ij        the errors of the block's earlier columns
    e_j   =  w_j where it is pruned, else 0
    w_j   =  0 where it is pruned

The mask is either given, or chosen in groups of M columns, after the errors of all earlier columns and before those of the
group are applied: of every row and group the N weights with the largest w² / pivot² are kept, of equal ones those with the
higher index.

All kernels take a `ColumnBlock` and write `columns`, `errors` and, if they choose the mask, `keep`. Their results are equal up
to rounding, which may also decide between nearly equal scores. Non-finite weights give non-finite errors or weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from coprune.base.kernels.ranks import rank_in_groups
from coprune.base.native import solving

STRIP = 32
"""Number of columns updated together, few enough that the update of a single column reads little memory."""


Put = Callable[[Tensor, int], Tensor]
"""Rounds values of a column (O float32) to the grid on which it is stored, given its index in the block."""


class ColumnBlock(NamedTuple):
    """A block of columns, transposed, so that each column's weights are contiguous in memory."""

    columns: Tensor
    """C × O float32, contiguous, with the errors of earlier blocks applied; updated in place. Zero for dead inputs."""
    keep: Tensor
    """C × O bool, contiguous, True where a weight is kept: given, or written if N of M are chosen."""
    errors: Tensor
    """C × O float32, contiguous; written: the pruned weights, to be applied to the columns after the block."""
    unit: Tensor
    """C × C float32, rows of U divided by their pivots: upper triangular with ones on the diagonal. Any strides."""
    pivots: Tensor
    """C float32, contiguous: the diagonal of U."""
    n_of_m: tuple[int, int] | None
    """N and M of the choice, M dividing C; None if the mask is given."""


def walk_with_torch(block: ColumnBlock, put: Put | None = None) -> None:
    """Update the columns with torch, on any device: a few small operations per column.

    put: rounds a column's kept weights to a grid, zero to zero; the change counts as an error, like pruned weights.
    """
    columns, keep, errors, unit, pivots, n_of_m = block
    size = columns.shape[0]
    n, m = n_of_m or (0, size)
    for first in range(0, size, m):
        group = slice(first, first + m)
        push_errors(columns[group], errors[:first], unit[:first, group])
        if n_of_m is not None:
            score = (columns[group].T / pivots[group]).square()
            keep[group] = (rank_in_groups(score.reshape(-1, m)) >= m - n).reshape(-1, m).T
        own = None if put is None else _from(put, first)
        _walk_group(ColumnBlock(columns[group], keep[group], errors[group], unit[group, group], pivots, None), own)


def _from(put: Put, first: int) -> Put:
    return lambda column, number: put(column, first + number)


def walk_natively(block: ColumnBlock) -> None:
    """Update the columns with a native CPU kernel, which holds a row's errors in registers."""
    *tensors, n_of_m = block
    solving.update_columns(tensors, n_of_m or (0, 0))


def push_errors(columns: Tensor, errors: Tensor, unit: Tensor) -> None:
    """Subtract earlier columns' errors from later columns, in place.

    Args:
        columns: C × O float32, the later columns.
        errors: E × O float32, of the earlier columns.
        unit: E × C float32, part of the factor.
    """
    if errors.shape[0] and columns.shape[0]:
        columns.addmm_(unit.T, errors, alpha=-1)


def _walk_group(block: ColumnBlock, put: Put | None) -> None:
    """Update one group of columns with a known mask, strip by strip; columns and errors are written in place.

    Each column collects the earlier errors when it is processed; pushing them forward would also write what this only reads.
    """
    columns, keep, errors, unit, _, _ = block
    pruned = (~keep).to(columns.dtype)
    size = columns.shape[0]
    for start in range(0, size, STRIP):
        strip = slice(start, min(start + STRIP, size))
        push_errors(columns[strip], errors[:start], unit[:start, strip])
        for j in range(strip.start, strip.stop):
            column = columns[j]
            if j > start:
                column.addmv_(errors[start:j].T, unit[start:j, j], alpha=-1)
            if put is None:
                torch.mul(column, pruned[j], out=errors[j])
            else:
                stays = put(column.masked_fill(~keep[j], 0.0), j)
                torch.sub(column, stays, out=errors[j])
                column.copy_(stays)
    columns.masked_fill_(~keep, 0.0)
