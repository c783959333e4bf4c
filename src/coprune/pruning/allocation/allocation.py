"""The contract of an allocation: it looks at every matrix once and allocates one budget of zeros among them."""

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
"""A matrix of a block with the statistic of its inputs (None if none is asked for, or no token came to it)."""


@dataclass(frozen=True)
class Unit:
    """The smallest thing with a sparsity of its own: a matrix, or all experts of one parameter."""

    name: str
    """Path of the parameter, without an expert's number."""
    place: str
    """Name of its block; its own name if it lies outside the blocks."""
    rows: int
    """Outputs, of all its matrices together."""
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
    def looks(self) -> bool:
        """Whether it reads the weights."""

    @property
    def statistic(self) -> type[Statistic] | None:
        """The statistic of the inputs that it needs; None for none."""

    @property
    def first(self) -> int:
        """Number of calibration tokens to use, the first ones, in whole batches; 0: all."""

    def measure(self, shown: Sequence[Shown], target: Target) -> dict[str, Tensor]:
        """Measure the matrices of one block of the dense model.

        Args:
            shown: the block's matrices with the statistics of their inputs.
            target: the overall one.

        Returns:
            A vector of sums (float64) by name of matrix; sums of experts are added up. A matrix may be missing.
        """
        ...

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        """Allocate a target to every unit, so that together they have the overall sparsity.

        Args:
            units: all units to prune.
            sums: measurements by name of unit.
            target: the overall one.

        Raises:
            BadInput: the overall sparsity cannot be reached.
        """
        ...


def units_of(chosen: Chosen, block_names: Sequence[str], shared: bool = True) -> list[Unit]:
    """Gather the chosen matrices into units, in the order of the model.

    shared: whether those that several blocks share are among them; they are where no others are.
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
        outputs: by how much a matrix's outputs count, by its name; those of others all alike.
    """
    each = zip(units, targets, strict=True)
    return {name: replace(own, outputs=outputs.get(name)) for unit, own in each for name in unit.members}


def unit_name(matrix_name: str) -> str:
    """Return the unit that a matrix belongs to."""
    return matrix_name.partition("[")[0]


@dataclass(frozen=True)
class Uniform:
    """Prune every matrix alike."""

    looks: ClassVar[bool] = False
    statistic: ClassVar[None] = None
    first: ClassVar[int] = 0

    def measure(self, shown: Sequence[Shown], target: Target) -> dict[str, Tensor]:
        return {}

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        return [target] * len(units)


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The cost of a unit's sparsity: a convex function, and the sparsities between which it may be chosen.

    The limits are widened to whole steps.
    """

    cost: Callable[[Floats], Floats]
    low: float = 0.0
    high: float = 1.0


def wish(sparsity: float, unit: Unit) -> Curve:
    """Return the cost curve of a wanted sparsity: the squared distance from it, for every weight."""
    return Curve(lambda s: unit.weights * (s - sparsity) ** 2)


def within_budget(units: Sequence[Unit], curves: Sequence[Curve], target: Target) -> list[Target]:
    """Choose every unit's target so that the summed cost is least and the overall sparsity is the asked one.

    The total is exact where exchanges of up to two steps lead there, as with the many matrices of a model; at worst, with
    few matrices at their limits, it is off by a step of the largest (one input of each of its rows).

    Args:
        units: all that are to be pruned.
        curves: what the sparsity of each costs.
        target: the overall one.

    Raises:
        BadInput: the curves' limits do not leave room for the budget.
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
        costs: for every unit the cost after 0, 1, 2 … steps, convex.
        masses: what one step of a unit takes from the budget.
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
            "the allocation's limits leave no room for the overall sparsity that is asked for",
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
            continue  # nothing more of this unit fits; smaller steps of others may
        left -= masses[u]
        taken[u] += 1
        if taken[u] < len(slopes[u]):
            heapq.heappush(queue, (float(slopes[u][taken[u]]), u))
    return _exchange(costs, masses, taken, left)


def _exchange(costs: Sequence[Floats], masses: Sequence[int], taken: list[int], left: float) -> list[int]:
    """Take or give back a step, or two at once, while that leaves less of the budget unspent or overspent."""
    while abs(left) > 1e-6:
        moves = _moves(costs, masses, taken)
        mass = np.array([m for _, _, m, _ in moves])
        cost = np.array([c for _, _, _, c in moves])
        # The last row and column mean no move, so that single moves are pairs too.
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
    """Return every possible step up or down: unit, direction, mass, change of cost; and finally no step."""
    moves: list[tuple[int, int, float, float]] = []
    for u, (cost, mass, now) in enumerate(zip(costs, masses, taken, strict=True)):
        for direction in (1, -1):
            if 0 <= now + direction < len(cost):
                moves.append((u, direction, float(direction * mass), float(cost[now + direction] - cost[now])))
    return [*moves, (-1, 0, 0.0, 0.0)]
