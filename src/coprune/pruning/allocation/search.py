"""A search for the budget: how long it goes on, and among which sparsities a search over zeros chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from coprune.base.errors import BadInput
from coprune.base.options import require_not_negative, require_positive
from coprune.model.walk.statistics import Statistic
from coprune.pruning.allocation.base import Unit
from coprune.pruning.allocation.budget import spend, wish, within_budget
from coprune.pruning.allocation.fisher import ByFisher
from coprune.pruning.evolution import Exchanges, Steps, Together
from coprune.recipe.pattern import Target

ALLOCATION_FILE = "allocation.yaml"
"""What a search over zeros found, in the run's folder, as `--allocation` takes it."""
_STEP = 0.1


@dataclass(frozen=True)
class Search:
    """Move steps of a budget from part to part, and keep what brings the model's distributions nearer to the dense model's.

    Paper: EvoPress, arXiv 2410.14649.
    """

    minutes: float = 0.0
    """How long, all runs that were killed in between together."""
    rounds: int = 0
    """Or how many tries."""
    tokens: int = 2048
    """Of the calibration, at least so many are looked at (of images: one batch)."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_not_negative(minutes=self.minutes, rounds=self.rounds, tokens=self.tokens)

    def require_end(self) -> None:
        """Raise BadInput unless it is said when to stop."""
        if bool(self.minutes) == bool(self.rounds):
            fix = "write search:minutes=8, or search:rounds=100"
            wrong = "a search goes on for some minutes or for some rounds, one of the two"
            raise BadInput(wrong, field="allocation", value="search", fix=fix)


@dataclass(frozen=True)
class LevelSearch(Search):
    """The same for zeros: every matrix has one of a few sparsities, at which it was pruned before."""

    levels: int = 5
    """Sparsities to choose from, the overall one in their middle."""
    step: float | None = None
    """From one to the next (N:M: at least one of M); None: 0.1, or less where the levels would not all fit."""
    outputs: float = ByFisher.outputs
    """As of `ByFisher`: how much outputs count at every level and in what is found, where N:M leaves that open."""

    looks: ClassVar[bool] = True
    statistic: ClassVar[type[Statistic]] = ByFisher.statistic

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None:
            require_positive(step=self.step)
        if self.levels < 3 or self.levels % 2 == 0:
            raise BadInput(
                f"option 'levels' must be odd and at least 3, not {self.levels!r}", field="levels", value=self.levels
            )

    def targets(self, target: Target) -> list[Target]:
        """What a matrix may become, ascending. Raises BadInput where there is nothing below the overall sparsity, or above."""
        each, room = self.levels // 2, min(target.sparsity, 1 - target.sparsity)
        step = min(_STEP, room / each) if self.step is None else self.step
        found = [target.with_sparsity(one) for one in target.pattern.levels_near(target.sparsity, step, each)]
        sparsities = [one.sparsity for one in found]
        if len({*sparsities}) < len(found) or not sparsities[0] < target.sparsity < sparsities[-1]:
            raise BadInput(
                f"a search needs sparsities below and above {target}, and the pattern has none {step:g} away",
                field="allocation",
                value="search",
                fix="give a smaller step, or another pattern",
            )
        return found

    def by_slopes(self, target: Target) -> ByFisher:
        """The allocation whose plan is tried first: what the model loses at the levels, to second order.

        Raises BadInput as `targets`.
        """
        grid = self.targets(target)
        # A level that would be all zeros is none, so there may be one more below than above.
        reach = max(grid[-1].sparsity - target.sparsity, target.sparsity - grid[0].sparsity)
        return ByFisher(bound=reach, points=self.levels, outputs=self.outputs)


def level_of(grid: Sequence[Target], target: Target) -> int:
    """The number of the level that is nearest to a target, the first being 1 (0 is the dense matrix)."""
    return 1 + min(range(len(grid)), key=lambda at: abs(grid[at].sparsity - target.sparsity))


def as_levels(units: Sequence[Unit], wanted: Sequence[Target], grid: Sequence[Target], target: Target) -> Steps:
    """The levels that are nearest to what is wanted, as much altogether as with the overall target everywhere.

    Args:
        units: all that are to be pruned.
        wanted: a target for each.
        grid: the targets of the levels.
        target: the overall one.
    """
    sparsities = np.array([one.sparsity for one in grid])
    costs = [unit.weights * (sparsities - own.sparsity) ** 2 for unit, own in zip(units, wanted, strict=True)]
    masses = [unit.weights for unit in units]
    middle = level_of(grid, target) - 1
    return tuple(1 + taken for taken in spend(costs, masses, float(middle * sum(masses))))


def targets_of(units: Sequence[Unit], steps: Steps, grid: Sequence[Target], target: Target) -> list[Target]:
    """What every unit becomes by its level, with exactly the overall sparsity altogether."""
    return within_budget(
        units, [wish(grid[at - 1].sparsity, unit) for unit, at in zip(units, steps, strict=True)], target
    )


def exchanges_of(units: Sequence[Unit], levels: int) -> Exchanges:
    """Levels are exchanged between single units, between whole blocks, and between units of a kind in all blocks."""
    single: list[Together] = [(at,) for at in range(len(units))]
    blocks: dict[str, list[int]] = {}
    kinds: dict[str, list[int]] = {}
    for at, unit in enumerate(units):
        blocks.setdefault(unit.place, []).append(at)
        kinds.setdefault(".".join(part for part in unit.name.split(".") if not part.isdigit()), []).append(at)
    several = [[tuple(own) for own in found.values()] for found in (blocks, kinds)]
    groups = [single, *(group for group in several if 1 < len(group) < len(units))]
    return Exchanges(groups, [unit.weights for unit in units], [levels] * len(units), least=1)
