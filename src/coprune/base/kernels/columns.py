"""The operation `walk_columns`: SparseGPT's walk through one block of a weight's columns (arXiv 2301.00774).

A column is what one input multiplies, the weights of all O outputs; C columns that follow each other are a block. With U
the upper factor of the inverse Hessian, zeroing the weight w in column j is made good best by taking w · U_jk / U_jj off
every later column k of its row. So, for the columns of a block in order:

    w_j  −=  Σ_{i<j} e_i · unit_ij        the errors that earlier columns of the block left
    e_j   =  w_j where it is pruned, else 0
    w_j   =  0 where it is pruned

Which weights are pruned is either given, or chosen in groups of M columns, when all errors before the group are in its
weights and none of its own: the N with the largest w² / pivot² of every row and group are kept, and of equal ones those
with the higher index.

All kernels take a `ColumnBlock` and write `columns`, `errors` and, where they choose, `keep`. They give the same, up to
rounding; scores that differ by less than rounding may change places. Weights that are not finite give errors or weights
that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from coprune.base.kernels.ranks import rank_in_groups
from coprune.base.native import solving

STRIP = 32
"""Columns that are brought up to date together: few enough that a column's own update reads little memory."""


Put = Callable[[Tensor, int], Tensor]
"""Gives the values nearest to some of a column's (O float32) on the grid that it is stored on; which column of the block."""


class ColumnBlock(NamedTuple):
    """Columns that are walked through together, transposed: a column's weights lie contiguous in memory."""

    columns: Tensor
    """C × O float32, contiguous, brought up to date with earlier blocks; written in place. Dead inputs' are zero."""
    keep: Tensor
    """C × O bool, contiguous, True where a weight is kept: given, or written where N of M are chosen."""
    errors: Tensor
    """C × O float32, contiguous; written: the weights that were pruned, for the columns after the block."""
    unit: Tensor
    """C × C float32, rows of U divided by their pivots: upper triangular with ones on the diagonal. Any strides."""
    pivots: Tensor
    """C float32, contiguous: the diagonal of U."""
    n_of_m: tuple[int, int] | None
    """N and M to choose by, M dividing C; None where the mask is given."""


def walk_with_torch(block: ColumnBlock, put: Put | None = None) -> None:
    """Update the columns with torch, on any device: a few small operations per column.

    put: rounds what is kept of a column to a grid, zero to zero; what that changes is an error as what is pruned is.
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
    """Take earlier columns' errors off later columns, in place.

    Args:
        columns: C × O float32, the later columns.
        errors: E × O float32, of the earlier ones.
        unit: E × C float32, of the factor.
    """
    if errors.shape[0] and columns.shape[0]:
        columns.addmm_(unit.T, errors, alpha=-1)


def _walk_group(block: ColumnBlock, put: Put | None) -> None:
    """Update one group of columns with a known mask, strip by strip; columns and errors are written in place.

    Each column adds the errors before it when its turn comes, which reads what pushing forward would read and write.
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
