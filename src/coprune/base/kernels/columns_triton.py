"""The operation `walk_columns` as one Triton kernel.

On a GPU the plain loop launches several small operations per column; here one launch does a whole block. No GPU has run it
yet, only Triton's interpreter, so on each device it is first compared with torch on a small block.

Rows are independent, so a program processes ROWS of them through all columns of the block, with their errors so far in
registers. The weights are transposed: a column's rows are neighbours in memory.
"""

from __future__ import annotations

from functools import cache

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from coprune.base.devices import launching_at
from coprune.base.kernels.columns import ColumnBlock, walk_with_torch

ROWS = 32
LARGEST_GROUP = 16
"""Maximum size of a group to choose from: all pairs of its entries are compared at once, in registers."""


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _pushed(columns, unit, errors, row, exists, rows, down, right, j, begin, end, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return column j minus the effect of the errors of columns begin … end − 1. down, right: strides of unit."""
    column = tl.arange(0, SIZE)
    factor = tl.load(unit + column * down + j * right, mask=(column >= begin) & (column < end), other=0.0)
    weight = tl.load(columns + j * rows + row, mask=exists, other=0.0)
    return weight - tl.sum(factor[:, None] * errors, axis=0)


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _update(  # type: ignore[no-untyped-def]
    columns, keep, left, unit, pivots, rows, size, down, right, M: tl.constexpr, PRUNED: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    column = tl.arange(0, SIZE)
    lane = tl.arange(0, M)
    errors = tl.zeros([SIZE, ROWS], dtype=tl.float32)
    for first in range(0, size, M):
        begin = 0
        if PRUNED > 0:
            for a in tl.static_range(M):
                weight = _pushed(columns, unit, errors, row, exists, rows, down, right, first + a, 0, first, SIZE)
                tl.store(columns + (first + a) * rows + row, weight, mask=exists)
            tl.debug_barrier()  # values stored by other threads are read next
            group = (first + lane)[:, None] * rows + row[None, :]
            score = tl.load(columns + group, mask=exists[None, :], other=0.0)
            score = score / tl.load(pivots + first + lane)[:, None]
            score = score * score
            beaten = score[:, None, :] < score[None, :, :]
            # Of equal scores the one with the lower index is pruned first.
            equal = (score[:, None, :] == score[None, :, :]) & (lane[:, None] < lane[None, :])[:, :, None]
            rank = tl.sum((beaten | equal).to(tl.int32), axis=0)
            tl.store(keep + group, (rank >= PRUNED).to(tl.uint8), mask=exists[None, :])
            tl.debug_barrier()
            begin = first
        for a in tl.static_range(M):
            j = first + a
            weight = _pushed(columns, unit, errors, row, exists, rows, down, right, j, begin, j, SIZE)
            kept = tl.load(keep + j * rows + row, mask=exists, other=1) != 0
            becomes = tl.where(kept, weight, 0.0)
            error = weight - becomes
            errors = tl.where(column[:, None] == j, error[None, :], errors)
            tl.store(columns + j * rows + row, becomes, mask=exists)
            tl.store(left + j * rows + row, error, mask=exists)


def walk_columns(block: ColumnBlock) -> None:
    """Update the columns of one block in place; with torch if the kernel supports neither the group nor the device."""
    group = 1 if block.n_of_m is None else block.n_of_m[1]
    served = group <= LARGEST_GROUP and not group & (group - 1)
    if served and is_proven(block.columns.device):
        launch(block)
    else:
        walk_with_torch(block)


def launch(block: ColumnBlock) -> None:
    """Update the columns of one block with the kernel. M is a power of two."""
    columns, keep, errors, unit, pivots, n_of_m = block
    size, rows = columns.shape
    n, group = n_of_m or (1, 1)
    with launching_at(columns):
        _update[(triton.cdiv(rows, ROWS),)](
            columns, keep.view(torch.uint8), errors, unit, pivots, rows, size,
            *unit.stride(), M=group, PRUNED=group - n, SIZE=triton.next_power_of_2(size), ROWS=ROWS,
        )  # fmt: skip


@cache
def is_proven(device: torch.device) -> bool:
    """Return whether the kernel compiles for a device and agrees with torch there on one small block."""
    by_torch, by_kernel = _small_block(device), _small_block(device)
    walk_with_torch(by_torch)
    try:
        launch(by_kernel)
    except Exception:  # Triton's compiler, the C compiler and the driver each have their own error types
        return False
    pairs = zip(by_torch[:3], by_kernel[:3], strict=True)
    return all(torch.allclose(wanted.float(), found.float(), atol=1e-4) for wanted, found in pairs)


def _small_block(device: torch.device) -> ColumnBlock:
    """Return eight columns of forty rows to prune to 2:4."""
    columns = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)).to(device)
    unit = (torch.eye(8) + torch.full((8, 8), 0.1).triu(1)).to(device)
    keep, errors = torch.empty(8, 40, dtype=torch.bool, device=device), torch.empty(8, 40, device=device)
    return ColumnBlock(columns, keep, errors, unit, torch.linspace(0.5, 1.5, 8).to(device), (2, 4))
