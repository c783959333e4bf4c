"""Round what a mask has left, whichever method chose it.

Methods that walk through a matrix column by column (`methods/sparsegpt.py`) round along the way. For all others, and where
something improved the weights after them, the same walk goes over the finished mask: the error of a rounded weight is made
good by those still to come.
"""

from __future__ import annotations

import torch

from coprune.base.kernels.columns import round_to_grid
from coprune.model.walk.statistics import Gram, Statistic
from coprune.pruning.methods.base import Pruned
from coprune.pruning.methods.sparsegpt import SparseGPT, inverse_factor_of, update_columns
from coprune.pruning.scales import fit_scales, without_negative_zeros
from coprune.recipe.grid import Grid
from coprune.recipe.pattern import Target


def rounded(pruned: Pruned, statistic: Statistic | None, target: Target) -> Pruned:
    """The same mask with values on the target's grid, if it has one and they are not there yet. Raises NumericalError."""
    if target.grid is None or pruned.scales is not None:
        return pruned
    return (
        round_by_columns(pruned, statistic, target)
        if isinstance(statistic, Gram)
        else round_nearest(pruned, target.grid)
    )


def round_by_columns(pruned: Pruned, statistic: Gram, target: Target) -> Pruned:
    """Round what a mask has left to the target's grid, column by column, the error of each made good by the kept ones after it.

    Args:
        pruned: as its method and refinements left it; not modified.
        statistic: the Gram matrix of its inputs.
        target: with a grid.

    Returns:
        The same mask with rounded values. Raises as `update_columns`.

    Paper: OBR, arXiv 2509.11177; GPTQ, arXiv 2210.17323.
    """
    # A weight whose input was never seen is as good as any other: it is rounded, and not set to zero.
    factor = inverse_factor_of(statistic, SparseGPT.damping)
    alive = factor._replace(dead=torch.zeros_like(factor.dead))
    keep = pruned.keep & (pruned.weight != 0)
    done = update_columns(
        pruned.weight, alive, target, SparseGPT.block_size, lambda _, columns: keep[:, columns], "auto"
    )
    return done._replace(events=pruned.events + done.events)


def round_nearest(pruned: Pruned, grid: Grid) -> Pruned:
    """Round every kept value by itself, where nothing is known of the inputs.

    Args:
        pruned: O × I, with groups that divide I.
        grid: what to round to.
    """
    rows, width = pruned.weight.shape
    step = grid.step(width)
    groups = pruned.weight.to(torch.float32).reshape(-1, step).T.contiguous()
    scales = fit_scales(groups, None, grid.half)
    rounded = round_to_grid(groups, scales, grid.half).T.reshape(rows, width)
    return pruned._replace(weight=without_negative_zeros(rounded), scales=scales.reshape(rows, -1))
