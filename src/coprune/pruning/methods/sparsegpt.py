"""SparseGPT: prune column by column and let the columns still to come make up for it (arXiv 2301.00774).

Zeroing a weight leaves an error in its row's output; the best change of the later weights of the row is a multiple
of one row of U, the upper Cholesky factor of the inverse Hessian. Columns are walked in blocks: inside a block errors
are pushed at once, later blocks get a whole block's errors in one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError
from coprune.base.kernels.columns import ColumnBlock, push_errors
from coprune.base.kernels.gram import panels
from coprune.base.kernels.table import kernel
from coprune.base.options import require_positive
from coprune.base.precision import full_float32
from coprune.base.reading import refuse_if
from coprune.model.walk.statistics import Gram
from coprune.pruning.linear_algebra import InverseFactor, factor_inverse
from coprune.pruning.methods.base import Pruned
from coprune.pruning.scales import fit_scales, without_negative_zeros
from coprune.recipe.pattern import Target

Choose = Callable[[Tensor, slice], Tensor]
"""Which weights of some columns to keep: (weights as updated so far, O × C; which columns) → O × C bool."""


@dataclass(frozen=True)
class SparseGPT:
    """Prune what costs least by W² / U_jj², and update the rest of the row.

    Paper: arXiv 2301.00774.
    """

    block_size: int = 128
    """Columns whose mask is chosen together (unstructured); for N:M it is rounded up to a multiple of M."""
    damping: float = 0.01
    """What is added to the Hessian's diagonal, as a fraction of its mean."""
    inner_loop: Literal["auto", "torch", "triton"] = "auto"
    """What walks over the columns of a block: auto is a native kernel on CPUs where it compiles, one of Triton's on NVIDIA's
    GPUs where it gives what torch gives, and torch elsewhere."""

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


def inverse_factor_of(statistic: Gram, damping: float) -> InverseFactor:
    """The factor of a statistic's damped inverse, computed once and kept with the statistic."""

    def compute() -> InverseFactor:
        with full_float32():
            return factor_inverse(statistic.gram, damping)

    return statistic.remember(("inverse factor", damping), compute)


def update_columns(
    weight: Tensor, factor: InverseFactor, target: Target, block_size: int, choose: Choose | None, walk: str = "torch"
) -> Pruned:
    """Zero the columns one after another, each pruned weight's error pushed into the columns after it.

    Where the target has a grid, kept weights are rounded to it in the same walk, and what that loses is pushed on likewise
    (GPTQ, arXiv 2210.17323).

    Args:
        weight: O × I float, not modified.
        factor: of the inverse of the inputs' damped Gram matrix.
        target: pattern, sparsity and grid.
        block_size: columns that are walked through before later ones get their errors; rounded up to whole groups.
        choose: asked for the mask of columns that have to be chosen together, in order, with weights that hold every
            earlier column's error (and beforehand for those that a group's scale depends on); None to keep N of M by
            SparseGPT's own score, which the walk does by itself.
        walk: name of the kernel for `walk_columns`, or auto.

    Raises:
        BadInput: the pattern or the grid does not fit the width.
        NumericalError: the weights that come out are not finite.
    """
    rows, width = weight.shape
    pattern = target.pattern
    pattern.check_width(width)
    if target.sparsity == 0:
        # Where nothing falls, weights are only rounded; zeros that the model has already stay zeros.
        mask = weight != 0
        choose = lambda _, columns: mask[:, columns]  # noqa: E731
        factor = factor._replace(dead=torch.zeros_like(factor.dead))
    block_size += -block_size % (pattern.group_size or 1)
    together = block_size if choose is None else pattern.columns_together(block_size)
    walk_columns = kernel("walk_columns", weight.device, walk)
    with full_float32():
        # Transposed, so that a column of the weight lies contiguous in memory.
        columns = weight.to(torch.float32).masked_fill(factor.dead, 0.0).T.contiguous()
        sweep = _Sweep(columns, factor, target, choose, walk_columns)
        for block in panels(width, block_size):
            errors = torch.empty(block.stop - block.start, rows, device=weight.device)
            for group in panels(block.stop - block.start, together):
                sweep.walk(slice(block.start + group.start, block.start + group.stop), block.start, errors)
            later = slice(block.stop, width)
            push_errors(columns[later], errors, factor.unit[block, later])
    finite = torch.isfinite(columns).all() & torch.isfinite(errors).all()
    refuse_if(~finite, NumericalError("the update of the weights gave NaN or infinite values"))
    done = Pruned(columns.T.contiguous(), sweep.keep.T.contiguous(), factor.events)
    if sweep.scales is None:
        return done
    return done._replace(weight=without_negative_zeros(done.weight), scales=sweep.scales.T.contiguous())


class _Sweep:
    """One walk through all columns of a matrix: C × O weights and mask, written in place."""

    def __init__(
        self,
        columns: Tensor,
        factor: InverseFactor,
        target: Target,
        choose: Choose | None,
        walk_columns: Callable[[ColumnBlock], None],
    ) -> None:
        self._columns, self._factor, self._target = columns, factor, target
        self._choose, self._walk_columns = choose, walk_columns
        self.keep = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
        self._n_of_m = target.pattern.n_of_m if choose is None else None
        self._half, self._step = 0, columns.shape[0]
        self.scales: Tensor | None = None
        """Groups × O, of a target with a grid."""
        if (grid := target.grid) is not None:
            grid.check_width(columns.shape[0])
            grid.check_groups(target.pattern.group_size)
            self._half, self._step = grid.half, grid.step(columns.shape[0])
            self.scales = torch.empty(grid.steps(columns.shape[0]), columns.shape[1], device=columns.device)

    def walk(self, whole: slice, start: int, errors: Tensor) -> None:
        """Walk through columns whose mask is chosen at once. start: of their block; errors: B × O, what its columns left."""
        columns, keep, factor = self._columns, self.keep, self._factor
        push_errors(columns[whole], errors[: whole.start - start], factor.unit[start : whole.start, whole])
        if self._choose is not None:
            keep[whole] = self._choose(columns[whole].T, whole).T
        for part in self._parts(whole):
            before = slice(whole.start, part.start)
            push_errors(columns[part], errors[before.start - start : before.stop - start], factor.unit[before, part])
            scales = self._scales_of(part, whole, start, errors)
            unit, pivots, own = (
                factor.unit[part, part],
                factor.pivots[part],
                errors[part.start - start : part.stop - start],
            )
            self._walk_columns(
                ColumnBlock(columns[part], keep[part], own, unit, pivots, self._n_of_m, scales, self._half)
            )

    def _parts(self, whole: slice) -> list[slice]:
        """Pieces of some columns, none of which has parts of two groups of the grid."""
        if self.scales is None:
            return [whole]
        edges = [edge for edge in range(0, whole.stop, self._step) if edge > whole.start]
        return [slice(*ends) for ends in pairwise([whole.start, *edges, whole.stop])]

    def _scales_of(self, part: slice, whole: slice, start: int, errors: Tensor) -> Tensor | None:
        """The scales of some columns of one group, C × O, which are chosen when the walk comes to the group's first."""
        if self.scales is None:
            return None
        group = part.start // self._step
        if part.start == group * self._step:
            ahead = slice(part.start, part.start + self._step)
            current = self._columns[ahead].clone()
            # What comes after `whole` still lacks the errors of this block.
            lacking, done = slice(whole.stop, max(whole.stop, ahead.stop)), part.start - start
            push_errors(
                current[lacking.start - ahead.start :], errors[:done], self._factor.unit[start : part.start, lacking]
            )
            current.masked_fill_(~self._expected(current, ahead, whole), 0.0)
            self.scales[group] = fit_scales(current, self._factor.pivots[ahead].square().reciprocal(), self._half)
        return self.scales[group].expand(part.stop - part.start, -1).contiguous()

    def _expected(self, current: Tensor, ahead: slice, whole: slice) -> Tensor:
        """Which weights of a group will be kept, C × O, as far as can be told when the walk comes to it."""
        if self._choose is None:
            return self._target.keep((current.T / self._factor.pivots[ahead]).square()).T
        return self.keep[ahead] if ahead.stop <= whole.stop else self._choose(current.T, ahead).T
