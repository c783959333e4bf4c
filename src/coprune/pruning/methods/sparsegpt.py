"""SparseGPT: prune column by column and let the columns still to come make up for it (arXiv 2301.00774).

Zeroing a weight leaves an error in its row's output; the best change of the later weights of the row is a multiple
of one row of U, the upper Cholesky factor of the inverse Hessian. Columns are walked in blocks: inside a block errors
are pushed at once, later blocks get a whole block's errors in one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError
from coprune.base.native import solving
from coprune.base.options import require_positive
from coprune.base.precision import full_float32
from coprune.model.walk.statistics import Gram
from coprune.pruning.linear_algebra import InverseFactor, factor_inverse
from coprune.pruning.methods.base import Pruned
from coprune.recipe.pattern import Pattern, Target

Choose = Callable[[Tensor, slice], Tensor]
"""Which weights of some columns to keep: (weights as updated so far, O × C; which columns) → O × C bool."""

STRIP = 32
"""Columns that are brought up to date together: few enough that a column's own update reads little memory."""


@dataclass(frozen=True)
class SparseGPT:
    """Prune what costs least by W² / U_jj², and update the rest of the row."""

    block_size: int = 128
    """Columns whose mask is chosen together (unstructured); for N:M it must be a multiple of M."""
    damping: float = 0.01
    """What is added to the Hessian's diagonal, as a fraction of its mean."""
    inner_loop: Literal["auto", "torch", "triton"] = "auto"
    """What walks over the columns of a block: auto is a native kernel on CPUs where it compiles and torch elsewhere;
    triton is one kernel for GPUs, which has not been measured on one."""

    statistic: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        require_positive(block_size=self.block_size, damping=self.damping)
        if self.inner_loop == "triton" and find_spec("triton") is None:
            raise BadInput("inner_loop triton needs Triton, which PyTorch brings for GPUs: pip install triton.")

    def prune(self, weight: Tensor, statistic: Gram, target: Target) -> Pruned:
        factor = inverse_factor_of(statistic, self.damping)

        def choose(current: Tensor, columns: slice) -> Tensor:
            return target.keep((current / factor.pivots[columns]).square())

        return update_columns(weight, factor, choose, target, self.block_size, _UPDATES[self.inner_loop])


def inverse_factor_of(statistic: Gram, damping: float) -> InverseFactor:
    """The factor of a statistic's damped inverse, computed once and kept with the statistic."""

    def compute() -> InverseFactor:
        with full_float32():
            return factor_inverse(statistic.gram, damping)

    return statistic.remember(("inverse factor", damping), compute)


class ColumnBlock(NamedTuple):
    """Columns that are walked through together. columns, keep and errors (C × O) are written in place."""

    columns: Tensor
    keep: Tensor
    errors: Tensor
    factor: InverseFactor
    place: slice
    """Where the block lies in the width."""
    choose: Choose
    pattern: Pattern


def update_block(block: ColumnBlock) -> None:
    """Choose and zero the weights of one block, a group of columns at a time."""
    columns, keep, errors, factor, place, choose, pattern = block
    size = columns.shape[0]
    unit = factor.unit[place, place]
    chosen_at_once = pattern.columns_together(size)
    for first in range(0, size, chosen_at_once):
        group = slice(first, min(first + chosen_at_once, size))
        _push(columns[group], errors[:first], unit[:first, group])
        keep[group] = choose(columns[group].T, slice(place.start + group.start, place.start + group.stop)).T
        _update_group(columns[group], keep[group], errors[group], unit[group, group])


def update_block_natively(block: ColumnBlock) -> None:
    """The same in the native kernel, which chooses N:M itself by SparseGPT's score; by torch where there is none."""
    columns, keep, errors, factor, place, _, _ = block
    if not solving.walks_columns(columns.device):
        update_block(block)
        return
    pair = _choose_first(block)
    solving.update_columns(columns, keep, errors, factor.unit[place, place], factor.pivots[place], pair)


def update_block_by_triton(block: ColumnBlock) -> None:
    """The same in one Triton kernel, which chooses N:M itself by SparseGPT's score."""
    from coprune.pruning.methods import column_kernel

    columns, keep, errors, factor, place, _, _ = block
    group = _choose_first(block)
    column_kernel.update_block(columns, keep, errors, factor.unit[place, place], factor.pivots[place], group)


def _choose_first(block: ColumnBlock) -> tuple[int, int] | None:
    """Choose the block's mask, unless it is chosen group by group along the way; returns the N and M of the groups."""
    if block.pattern.n_of_m is not None:
        return block.pattern.n_of_m
    block.keep.copy_(block.choose(block.columns.T, block.place).T)
    return None


_UPDATES = {"auto": update_block_natively, "torch": update_block, "triton": update_block_by_triton}


def update_columns(
    weight: Tensor,
    factor: InverseFactor,
    choose: Choose,
    target: Target,
    block_size: int,
    update: Callable[[ColumnBlock], None] = update_block,
) -> Pruned:
    """Zero the columns one after another, each pruned weight's error pushed into the columns after it.

    weight: O × I. choose is asked once per block (unstructured) or once per group of M columns (N:M), with weights
    that hold every earlier column's error. update: what does one block. Raises BadInput where M does not
    divide the block size or the width.
    """
    rows, width = weight.shape
    pattern = target.pattern
    if not pattern.fits(block_size):
        raise BadInput(f"a block of {block_size} columns cannot be divided into the groups of pattern {pattern}.")
    pattern.check_width(width)
    with full_float32():
        # Transposed, so that a column of the weight lies contiguous in memory.
        columns = weight.to(torch.float32).masked_fill(factor.dead, 0.0).T.contiguous()
        keep = torch.empty(width, rows, dtype=torch.bool, device=weight.device)
        for start in range(0, width, block_size):
            block = slice(start, min(start + block_size, width))
            errors = torch.empty(block.stop - start, rows, device=weight.device)
            update(ColumnBlock(columns[block], keep[block], errors, factor, block, choose, pattern))
            later = slice(block.stop, width)
            _push(columns[later], errors, factor.unit[block, later])
    if not bool(torch.isfinite(columns).all()):
        raise NumericalError("the update of the weights gave NaN or infinite values")
    return Pruned(columns.T.contiguous(), keep.T.contiguous(), factor.events)


def _push(columns: Tensor, errors: Tensor, unit: Tensor) -> None:
    """columns (C × O) −= unitᵀ (C × E) · errors (E × O), in place."""
    if errors.shape[0] and columns.shape[0]:
        columns.addmm_(unit.T, errors, alpha=-1)


def _update_group(columns: Tensor, keep: Tensor, errors: Tensor, unit: Tensor) -> None:
    """Zero one group of columns in order, strip by strip; columns and errors (C × O) are written in place.

    Because U's rows are divided by their pivots, a column's error is just the weight that falls. Each column takes up
    the errors before it when its turn comes: that reads what pushing forward would read and write.
    """
    falls = (~keep).to(columns.dtype)
    size = columns.shape[0]
    for start in range(0, size, STRIP):
        strip = slice(start, min(start + STRIP, size))
        _push(columns[strip], errors[:start], unit[:start, strip])
        for j in range(strip.start, strip.stop):
            column = columns[j]
            if j > start:
                column.addmv_(errors[start:j].T, unit[start:j, j], alpha=-1)
            torch.mul(column, falls[j], out=errors[j])
    columns.masked_fill_(~keep, 0.0)
