"""SparseGPT: prune column by column and compensate in the remaining columns (arXiv 2301.00774).

Zeroing a weight leaves an error in its row's output; the best change of the row's later weights is a multiple of one row
of U, the upper Cholesky factor of the inverse Hessian. Columns are processed in blocks: within a block errors are passed
on at once, later blocks get a whole block's errors in one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal

import torch
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError
from coprune.base.kernels.columns import ColumnBlock, Put, push_errors, walk_with_torch
from coprune.base.kernels.gram import panels
from coprune.base.kernels.kernel_table import kernel
from coprune.base.method_options import require_positive
from coprune.base.precision import full_float32
from coprune.base.reading import refuse_if
from coprune.model.walk.statistics import Gram
from coprune.pruning.linear_algebra import InverseFactor, factor_inverse
from coprune.pruning.methods.base import Pruned
from coprune.recipe.pattern import Grid, Target

Choose = Callable[[Tensor, slice], Tensor]
"""Mask of kept weights from (weights as updated so far, O × C; the columns' slice): O × C bool."""


@dataclass(frozen=True)
class SparseGPT:
    """Prune what costs least by W² / U_jj², and update the rest of the row.

    Paper: arXiv 2301.00774.
    """

    block_size: int = 128
    """Columns whose mask is chosen together (unstructured); for N:M it is rounded up to a multiple of M."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    inner_loop: Literal["auto", "torch", "triton"] = "auto"
    """The loop over a block's columns: auto is a native kernel on CPUs where it compiles, a Triton kernel on NVIDIA GPUs
    where it matches torch, and torch elsewhere."""

    statistic: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        require_positive(block_size=self.block_size, damping=self.damping)
        if self.inner_loop == "triton" and find_spec("triton") is None:
            needs = "inner_loop triton needs Triton, which PyTorch brings for GPUs"
            raise BadInput(needs, field="inner_loop", value="triton", fix="pip install triton")

    def prune(self, weight: Tensor, statistic: Gram, target: Target) -> Pruned:
        factor = inverse_factor_of(statistic, self.damping)

        def choose(current: Tensor, columns: slice) -> Tensor:
            return target.keep((current / factor.pivots[columns]).square())

        own = target.pattern.n_of_m is not None
        return update_columns(weight, factor, target, self.block_size, None if own else choose, self.inner_loop)


def _put(grid: Grid, first: int) -> Put:
    """Return a function that rounds a block's columns to a grid. first: the number of the block's first column."""

    def put(column: Tensor, number: int) -> Tensor:
        return grid(column[:, None], slice(first + number, first + number + 1))[:, 0]

    return put


def inverse_factor_of(statistic: Gram, damping: float) -> InverseFactor:
    """Return the factor of the damped inverse Gram matrix, cached in the statistic."""

    def compute() -> InverseFactor:
        with full_float32():
            return factor_inverse(statistic.gram, damping)

    return statistic.remember(("inverse factor", damping), compute)


def update_columns(
    weight: Tensor, factor: InverseFactor, target: Target, block_size: int, choose: Choose | None, walk: str = "torch"
) -> Pruned:
    """Prune column by column, compensating each pruned weight's error in later columns.

    Args:
        weight: O × I float, not modified.
        factor: factor of the inverse of the inputs' damped Gram matrix.
        target: pattern and sparsity, and the grid to which kept weights are rounded, if any; that error is also passed on to
            later columns.
        block_size: number of columns processed before later ones get their errors; rounded up to whole groups.
        choose: returns the mask of columns that have to be chosen together, in order, from weights that include earlier columns'
            errors; None to keep N of M by SparseGPT's own score, which the kernel computes.
        walk: name of the kernel for `walk_columns`, or auto.

    Raises:
        BadInput: the pattern does not fit the width.
        NumericalError: the resulting weights are not finite.
    """
    rows, width = weight.shape
    pattern = target.pattern
    pattern.check_width(width)
    if target.sparsity == 0:
        # If nothing is to be pruned, existing zeros stay zeros.
        mask = weight != 0
        choose = lambda _, columns: mask[:, columns]  # noqa: E731
        factor = factor._replace(dead=torch.zeros_like(factor.dead))
    block_size += -block_size % (pattern.group_size or 1)
    together = block_size if choose is None else pattern.columns_together(block_size)
    walk_columns = kernel("walk_columns", weight.device, walk)
    with full_float32():
        # Transposed, so that a column of the weight is contiguous in memory.
        columns = weight.to(torch.float32).masked_fill(factor.dead, 0.0).T.contiguous()
        keep = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
        own = pattern.n_of_m if choose is None else None
        for block in panels(width, block_size):
            errors = torch.empty(block.stop - block.start, rows, device=weight.device)
            for group in panels(block.stop - block.start, together):
                part = slice(block.start + group.start, block.start + group.stop)
                push_errors(columns[part], errors[: group.start], factor.unit[block.start : part.start, part])
                if choose is not None:
                    keep[part] = choose(columns[part].T, part).T
                unit, pivots = factor.unit[part, part], factor.pivots[part]
                walked = ColumnBlock(columns[part], keep[part], errors[group], unit, pivots, own)
                if target.grid is None:
                    walk_columns(walked)
                else:
                    walk_with_torch(walked, _put(target.grid, part.start))
            later = slice(block.stop, width)
            push_errors(columns[later], errors, factor.unit[block, later])
    finite = torch.isfinite(columns).all() & torch.isfinite(errors).all()
    refuse_if(~finite, NumericalError("the update of the weights gave NaN or infinite values"))
    return Pruned(columns.T.contiguous(), keep.T.contiguous(), factor.events)
