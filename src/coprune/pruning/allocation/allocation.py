"""The contract of an allocation: it measures every matrix once and divides one budget of zeros among them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.words import Set, Setting
from coprune.model.matrices import Matrix
from coprune.model.matrix_choice import Chosen
from coprune.model.walk.statistics import Statistic
from coprune.recipe.pattern import Target

Shown = tuple[Matrix, Statistic | None]
"""A matrix of a block with the statistic of its inputs (None if none was requested or it saw no token)."""


@dataclass(frozen=True)
class Unit:
    """The smallest unit with its own sparsity: a matrix, or all experts of one parameter."""

    name: str
    """Path of the parameter, without an expert's number."""
    place: str
    """Name of its block; its own name if it lies outside the blocks."""
    rows: int
    """Number of outputs, over all its matrices."""
    width: int
    members: tuple[str, ...]
    """Names of its matrices."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.width


class Allocation(Protocol):
    """A frozen dataclass whose fields are its hyperparameters."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    # Properties for the same reason as in Method; an allocation writes class variables.
    @property
    def measures(self) -> bool:
        """Whether it measures the matrices, in a walk over the blocks."""

    @property
    def statistic(self) -> type[Statistic] | None:
        """The statistic of the inputs that it needs; None for none."""

    @property
    def first(self) -> int:
        """Number of leading calibration tokens to use, in whole batches; 0: all."""

    def measure(self, shown: Sequence[Shown], target: Target) -> dict[str, Tensor]:
        """Measure the matrices of one block of the dense model.

        Args:
            shown: the block's matrices with the statistics of their inputs.
            target: the overall target.

        Returns:
            A vector of sums (float64) by name of matrix; experts are added up. A matrix may be missing.
        """
        ...

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        """Allocate a target to each unit so that together they have the overall sparsity.

        Args:
            units: all units to prune.
            sums: measurements by name of unit.
            target: the overall target.

        Raises:
            BadInput: the overall sparsity cannot be reached.
        """
        ...


def units_of(chosen: Chosen, block_names: Sequence[str], shared: bool = True) -> list[Unit]:
    """Gather the chosen matrices into units, in the order of the model.

    shared: whether to include matrices shared by several blocks; they are always included if there are no others.
    """
    members: dict[str, list[Matrix]] = {}
    places: dict[str, str] = {}
    several = [uses[0] for uses in chosen.several] if shared or not (any(chosen.blocks) or chosen.outside) else []
    for place, matrices in [*zip(block_names, chosen.blocks, strict=True), (None, [*several, *chosen.outside])]:
        for matrix in matrices:
            name = unit_name(matrix.name)
            members.setdefault(name, []).append(matrix)
            places[name] = name if place is None else place
    return [
        Unit(
            name,
            places[name],
            sum(matrix.shape[0] for matrix in matrices),
            matrices[0].shape[1],
            tuple(matrix.name for matrix in matrices),
        )
        for name, matrices in members.items()
    ]


def targets_by_matrix(
    units: Sequence[Unit], targets: Sequence[Target], outputs: Mapping[str, Tensor]
) -> dict[str, Target]:
    """Return the target of every matrix, by its name.

    Args:
        units: all that are to be pruned.
        targets: a target for each.
        outputs: weights of a matrix's outputs, by name; outputs of other matrices weigh the same.
    """
    each = zip(units, targets, strict=True)
    return {name: replace(own, outputs=outputs.get(name)) for unit, own in each for name in unit.members}


def unit_name(matrix_name: str) -> str:
    """Return the name of a matrix's unit."""
    return matrix_name.partition("[")[0]


@dataclass(frozen=True)
class Uniform:
    """Give every matrix the same sparsity."""

    measures: ClassVar[bool] = False
    statistic: ClassVar[None] = None
    first: ClassVar[int] = 0

    def measure(self, shown: Sequence[Shown], target: Target) -> dict[str, Tensor]:
        return {}

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        return [target] * len(units)


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A unit's cost as a convex function of its sparsity, and the range of sparsities to choose from.

    The limits are widened to whole steps.
    """

    cost: Callable[[Floats], Floats]
    low: float = 0.0
    high: float = 1.0


def wish(sparsity: float, unit: Unit) -> Curve:
    """Return the cost curve of a wanted sparsity: the squared distance from it, times the number of weights."""
    return Curve(lambda s: unit.weights * (s - sparsity) ** 2)


def within_budget(units: Sequence[Unit], curves: Sequence[Curve], target: Target) -> list[Target]:
    """Choose each unit's target so that the total cost is least and the overall sparsity is met.

    The total is exact if swaps of up to two steps can reach it, as with the many matrices of a model; at worst, with few
    matrices at their limits, it is off by one step of the largest (one input of each of its rows).

    Args:
        units: all that are to be pruned.
        curves: what the sparsity of each costs.
        target: the overall target.

    Raises:
        BadInput: the curves' limits leave no room for the budget.
    """
    pattern = target.pattern
    periods = [pattern.steps(unit.width) for unit in units]
    masses = [unit.weights // period for unit, period in zip(units, periods, strict=True)]
    least = pattern.first_step
    first, costs = [], []
    for curve, period in zip(curves, periods, strict=True):
        # Rounded first, since 0.29 · 100 is 28.999… in binary.
        low = int(np.floor(round(curve.low * period, 6)))
        high = int(np.ceil(round(curve.high * period, 6)))
        low, high = max(least, min(low, period - 1)), max(least, min(high, period - 1))
        first.append(low)
        costs.append(curve.cost(np.arange(low, high + 1, dtype=np.float64) / period))
    budget = sum(unit.weights for unit in units) * target.sparsity
    steps = spend(costs, masses, budget - sum(m * f for m, f in zip(masses, first, strict=True)))
    return [
        target.with_sparsity((start + taken) / period)
        for start, taken, period in zip(first, steps, periods, strict=True)
    ]


def spend(costs: Sequence[Floats], masses: Sequence[int], budget: float) -> list[int]:
    """Take steps of least cost until the budget is spent.

    Args:
        costs: for each unit, its convex cost after 0, 1, 2 … steps.
        masses: what one step of each unit takes from the budget.
        budget: in the same unit.

    Returns:
        The number of steps of every unit.

    Raises:
        BadInput: the budget is out of reach by more than half a step.
    """
    room = sum(mass * (len(cost) - 1) for cost, mass in zip(costs, masses, strict=True))
    slack = min(masses) / 2 + 1e-6
    if not -slack <= budget <= room + slack:
        raise BadInput(
            "the allocation's limits leave no room for the requested overall sparsity",
            field="allocation",
            fix=("ask for another ", Setting("sparsity"), ", or take ", Set("allocation", "uniform")),
        )
    taken = [0] * len(costs)
    slopes = [np.diff(cost) / mass for cost, mass in zip(costs, masses, strict=True)]
    queue = [(float(slope[0]), u) for u, slope in enumerate(slopes) if len(slope)]
    heapq.heapify(queue)
    left = budget
    while queue:
        _, u = heapq.heappop(queue)
        if masses[u] > left + 1e-6:
            continue  # no further step of this unit fits; smaller steps of others may
        left -= masses[u]
        taken[u] += 1
        if taken[u] < len(slopes[u]):
            heapq.heappush(queue, (float(slopes[u][taken[u]]), u))
    return _exchange(costs, masses, taken, left)


def _exchange(costs: Sequence[Floats], masses: Sequence[int], taken: list[int], left: float) -> list[int]:
    """Take or give back one or two steps at a time while that brings the total closer to the budget."""
    while abs(left) > 1e-6:
        moves = _moves(costs, masses, taken)
        mass = np.array([m for _, _, m, _ in moves])
        cost = np.array([c for _, _, _, c in moves])
        # The last row and column stand for no move, so single moves are pairs, too.
        total = np.abs(left - (mass[:, None] + mass[None, :]))
        own = np.array([u for u, _, _, _ in moves])
        total[own[:, None] == own[None, :]] = np.inf
        best = float(total.min())
        if best >= abs(left) - 1e-6:
            return taken
        price = np.where(total <= best + 1e-6, cost[:, None] + cost[None, :], np.inf)
        for index in np.unravel_index(int(price.argmin()), price.shape):
            u, direction, step, _ = moves[int(index)]
            if direction:
                taken[u] += direction
            left -= step
    return taken


def _moves(costs: Sequence[Floats], masses: Sequence[int], taken: Sequence[int]) -> list[tuple[int, int, float, float]]:
    """Return every possible step up or down as unit, direction, mass and change of cost; the last is no step."""
    moves: list[tuple[int, int, float, float]] = []
    for u, (cost, mass, now) in enumerate(zip(costs, masses, taken, strict=True)):
        for direction in (1, -1):
            if 0 <= now + direction < len(cost):
                moves.append((u, direction, float(direction * mass), float(cost[now + direction] - cost[now])))
    return [*moves, (-1, 0, 0.0, 0.0)]
