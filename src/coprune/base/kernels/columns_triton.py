"""The operation `walk_columns` as one Triton kernel.

On a GPU the plain loop launches several small operations per column; here one launch does a whole block. Not measured on
a GPU: it is tested for correctness in Triton's interpreter only, so it is used where it is asked for.

Rows are independent, so a program takes ROWS of them through all columns of the block, with the errors that they left so
far in registers. The weights are transposed: a column's rows are neighbours in memory.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from coprune.base.devices import launching_at
from coprune.base.errors import BadInput
from coprune.base.kernels.columns import ColumnBlock
from coprune.base.words import Set

ROWS = 32


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _pushed(columns, unit, errors, row, exists, rows, down, right, j, begin, end, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Column j less what the errors of columns begin … end − 1 change in it. down, right: strides of unit."""
    column = tl.arange(0, SIZE)
    factor = tl.load(unit + column * down + j * right, mask=(column >= begin) & (column < end), other=0.0)
    weight = tl.load(columns + j * rows + row, mask=exists, other=0.0)
    return weight - tl.sum(factor[:, None] * errors, axis=0)


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _on_grid(weight, scale, exists, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights as multiples of their scales, or as they are where HALF is 0."""
    if HALF > 0:
        step = tl.load(scale, mask=exists, other=1.0)
        code = tl.minimum(tl.maximum(weight / step, -HALF), HALF - 1)
        # 1.5 · 2²³: a number of less than 2²² added to it is rounded to a whole one.
        weight = ((code + 12582912.0) - 12582912.0) * step
    return weight


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _update(  # type: ignore[no-untyped-def]
    columns, keep, left, unit, pivots, scales, rows, size, down, right, M: tl.constexpr, PRUNED: tl.constexpr,
    HALF: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
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
            tl.debug_barrier()  # what other threads stored is read next
            group = (first + lane)[:, None] * rows + row[None, :]
            score = tl.load(columns + group, mask=exists[None, :], other=0.0)
            score = score / tl.load(pivots + first + lane)[:, None]
            score = score * score
            beaten = score[:, None, :] < score[None, :, :]
            # Of equal scores the one with the lower index falls first.
            equal = (score[:, None, :] == score[None, :, :]) & (lane[:, None] < lane[None, :])[:, :, None]
            rank = tl.sum((beaten | equal).to(tl.int32), axis=0)
            tl.store(keep + group, (rank >= PRUNED).to(tl.uint8), mask=exists[None, :])
            tl.debug_barrier()
            begin = first
        for a in tl.static_range(M):
            j = first + a
            weight = _pushed(columns, unit, errors, row, exists, rows, down, right, j, begin, j, SIZE)
            kept = tl.load(keep + j * rows + row, mask=exists, other=1) != 0
            becomes = tl.where(kept, _on_grid(weight, scales + j * rows + row, exists, HALF), 0.0)
            error = weight - becomes
            errors = tl.where(column[:, None] == j, error[None, :], errors)
            tl.store(columns + j * rows + row, becomes, mask=exists)
            tl.store(left + j * rows + row, error, mask=exists)


def walk_columns(block: ColumnBlock) -> None:
    """Walk through the columns of one block, in place. Raises BadInput where M is not a power of two."""
    columns, keep, errors, unit, pivots, n_of_m, scales, half = block
    size, rows = columns.shape
    n, group = n_of_m or (1, 1)
    if group & (group - 1):
        raise BadInput(
            f"the Triton loop takes groups of a power of two, which {n}:{group} has not",
            fix=("use ", Set("inner_loop", "torch")),
        )
    with launching_at(columns):
        _update[(triton.cdiv(rows, ROWS),)](
            columns, keep.view(torch.uint8), errors, unit, pivots, columns if scales is None else scales, rows, size,
            *unit.stride(), M=group, PRUNED=group - n, HALF=half, SIZE=triton.next_power_of_2(size), ROWS=ROWS,
        )  # fmt: skip
