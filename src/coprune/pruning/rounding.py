"""Rounding to a file's type, column by column, with each column's error compensated in later columns.

This is GPTQ (arXiv 2210.17323): SparseGPT's update with a grid instead of a mask. A block's scales are chosen when the walk
reaches it, from weights that already compensate for all earlier columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.base.kernels.columns import ColumnBlock, push_errors, walk_with_torch
from coprune.base.kernels.gram import panels
from coprune.base.precision import full_float32
from coprune.base.reading import refuse_if
from coprune.model.checkpoint.formats.block_types import BlockType, Scales
from coprune.pruning.linear_algebra import InverseFactor

_TOGETHER = 256
"""Number of columns after which later ones get their errors; a multiple of every type's block size."""


_STRIP = 32
"""Number of columns of a sweep updated one by one; every type's blocks are whole strips."""


class Rounded(NamedTuple):
    """A matrix as stored in a type."""

    values: Tensor
    """O × I float32."""
    stored: Tensor
    """O × bytes of a row, uint8."""


@dataclass(frozen=True)
class Loss:
    """The weight of errors in a matrix, derived from its inputs."""

    gram: Tensor
    """I × I float32, damped."""
    factor: InverseFactor
    """Factor of its inverse."""
    weights: Tensor
    """I float32, above 0: weights of errors in the choice of scales."""


def round_columns(weight: Tensor, loss: Loss, kind: BlockType) -> Rounded:
    """Round a matrix to a type.

    Zeros stay zeros if the type can always represent zero.

    Args:
        weight: O × I float32, not modified; blocks of the type divide I.
        loss: the weight of errors.
        kind: the type.

    Raises:
        NumericalError: the resulting weights are not finite.
    """
    with full_float32():
        columns = weight.T.contiguous()
        keep = columns != 0 if kind.zero else torch.ones_like(columns, dtype=torch.bool)
        puts = _walk(columns, keep, loss, kind)
        _sweep(columns, weight.T, keep, loss.gram, puts)
    refuse_if(~torch.isfinite(columns).all(), NumericalError("rounding gave NaN or infinite values"))
    return Rounded(columns.T.contiguous(), torch.cat([put.pack() for put in puts], dim=1))


def _walk(columns: Tensor, keep: Tensor, loss: Loss, kind: BlockType) -> list[_Put]:
    """Round columns one after another in place, and return the rounding of each block. columns, keep: I × O."""
    width, rows = columns.shape
    factor, puts = loss.factor, list[_Put]()
    for block in panels(width, _TOGETHER):
        errors = torch.empty(block.stop - block.start, rows)
        for group in panels(block.stop - block.start, kind.size):
            part = slice(block.start + group.start, block.start + group.stop)
            push_errors(columns[part], errors[: group.start], factor.unit[block.start : part.start, part])
            puts.append(_Put(kind, kind.fit(columns[part].T.contiguous(), loss.weights[part]), rows))
            unit, pivots = factor.unit[part, part], factor.pivots[part]
            walk_with_torch(ColumnBlock(columns[part], keep[part], errors[group], unit, pivots, None), puts[-1])
        later = slice(block.stop, width)
        push_errors(columns[later], errors, factor.unit[block, later])
    return puts


def _sweep(columns: Tensor, target: Tensor, keep: Tensor, gram: Tensor, puts: Sequence[_Put]) -> None:
    """Round every column again, in place, to its best values given all others (CDQuant, arXiv 2406.17542).

    Args:
        columns: I × O float32, rounded.
        target: I × O, the values before rounding.
        keep: I × O bool.
        gram: I × I.
        puts: rounding of each block.
    """
    size = len(columns) // len(puts)
    slopes = gram @ (columns - target)
    for strip in panels(len(columns), _STRIP):
        own, before = slopes[strip], columns[strip].clone()
        for place, number in enumerate(range(strip.start, strip.stop)):
            best = (columns[number] - own[place] / gram[number, number]).masked_fill_(~keep[number], 0.0)
            rounded = puts[number // size](best, number % size)
            own.addr_(gram[strip, number], rounded - columns[number])
            columns[number] = rounded
        moved = columns[strip] - before
        for others in (slice(0, strip.start), slice(strip.stop, None)):
            slopes[others].addmm_(gram[others, strip], moved)


class _Put:
    """The rounding of a block's columns with fixed scales, which records their codes."""

    def __init__(self, kind: BlockType, scales: Scales, rows: int) -> None:
        self._kind, self._scales = kind, scales
        self._codes = torch.empty(kind.size, rows, dtype=torch.uint8)
        self._steps = scales.steps.T.contiguous()
        self._inverse = torch.where(self._steps == 0, 0.0, 1 / self._steps)
        self._added = None if scales.added is None else scales.added.T.contiguous()

    def __call__(self, column: Tensor, number: int) -> Tensor:
        """Return the nearest representable values of a column (O float32). number: of the column in its block."""
        group = number // self._kind.group
        added = None if self._added is None else self._added[group]
        codes = self._kind.codes((column if added is None else column - added) * self._inverse[group])
        self._codes[number] = codes
        values = self._kind.at(codes) * self._steps[group]
        return values if added is None else values + added

    def pack(self) -> Tensor:
        """Return the bytes of each row, O × bytes uint8."""
        return self._kind.pack(self._scales, self._codes.T.contiguous())
