"""Curves of what units lose with more and more zeros, measured at a few sparsities, and zeros spent where least is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.pruning.allocation.base import Unit
from coprune.pruning.allocation.budget import Curve, Floats, within_budget
from coprune.recipe.pattern import Target


def require_points(points: int) -> None:
    """Raise BadInput unless a curve can be drawn through so many points."""
    if points < 2:
        raise BadInput(f"option 'points' must be at least 2, not {points!r}", field="points", value=points)


def grid_around(target: Target, bound: float, points: int) -> list[Target]:
    """Targets around the overall one, from the lowest sparsity on.

    Args:
        target: the overall one.
        bound: how far a sparsity may be from it (N:M: at least one of M).
        points: how many (N:M: every N within the bound).
    """
    near = target.pattern.sparsities_near(target.sparsity, bound, points)
    return [target.with_sparsity(sparsity) for sparsity in near]


def spend_where_least_is_lost(
    units: Sequence[Unit], lost: Mapping[str, Tensor], grid: Sequence[Target], target: Target
) -> list[Target]:
    """Give every unit its target, so that the summed loss is least under the overall budget.

    Args:
        units: all that are to be pruned.
        lost: by name of unit, what it loses at each target of the grid (float64, in host memory); without any it loses nothing.
        grid: ascending.
        target: the overall one.

    Raises:
        BadInput: that cannot be.
    """
    sparsities = np.array([point.sparsity for point in grid])
    none = np.zeros_like(sparsities)
    curves = [convex_curve(sparsities, lost[unit.name].numpy() if unit.name in lost else none) for unit in units]
    return within_budget(units, curves, target)


def convex_curve(sparsities: Floats, errors: Floats) -> Curve:
    """The largest convex function below the measured points, with straight lines between its corners.

    Args:
        sparsities: ascending.
        errors: one for each.
    """
    corners: list[int] = []
    for i in range(len(sparsities)):
        while len(corners) > 1 and _above(corners[-2], corners[-1], i, sparsities, errors):
            corners.pop()
        corners.append(i)
    x, y = sparsities[corners], errors[corners]

    def cost(s: Floats) -> Floats:
        # Straight on beyond the ends, where whole steps may lead by less than one.
        inside = np.interp(s, x, y)
        if len(x) < 2:
            return inside
        first, last = (y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
        result: Floats = inside + first * np.minimum(s - x[0], 0) + last * np.maximum(s - x[-1], 0)
        return result

    return Curve(cost, float(sparsities[0]), float(sparsities[-1]))


def _above(a: int, b: int, c: int, x: Floats, y: Floats) -> bool:
    """Whether the point b lies on or above the line from a to c."""
    return bool((y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a]))
