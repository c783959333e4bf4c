"""The next budgets that a search tries: the best so far with some steps exchanged, the likeliest of several such.

What an exchange will do is guessed from all that was tried before: a straight line through the differences from the best,
which is pulled to zero where little is known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Steps = tuple[int, ...]
"""How many steps every part loses."""
Together = tuple[int, ...]
"""Numbers of parts that lose a step, or get one back, at the same time."""
GUESSED = 24
"""So many changed budgets are drawn for each that is tried, and those with the lowest guesses are."""
RIDGE = 1.0
"""How strongly guesses are pulled to zero, in squared steps."""
MOST_EXCHANGES = 6


@dataclass(frozen=True)
class Exchanges:
    """What may change places: steps of parts, such that all parts together lose as much as before."""

    groups: Sequence[Sequence[Together]]
    """Among the members of one group steps are exchanged."""
    masses: Sequence[int]
    """By how much a step of every part counts."""
    most: Sequence[int]
    """Steps that every part can lose."""
    least: int = 0
    """Steps that every part loses at least."""

    def change(self, steps: Steps, draw: random.Random) -> Steps:
        """Exchange some steps."""
        changed = list(steps)
        for _ in range(draw.randint(1, MOST_EXCHANGES)):
            changed = self._exchange(changed, draw.choice(self.groups), draw)
        return tuple(changed)

    def _exchange(self, steps: list[int], group: Sequence[Together], draw: random.Random) -> list[int]:
        """A step given back, and another taken; then more of them, until what goes is as much as before."""
        giving, taking = self._able(steps, group, -1), self._able(steps, group, 1)
        if not giving or not taking:
            return steps
        back, more = draw.choice(giving), draw.choice(taking)
        if back == more:
            return steps
        changed = _moved(_moved(steps, back, -1), more, 1)
        missing = self._mass(back) - self._mass(more)
        moved = {back: -1, more: 1}
        while missing:
            way = 1 if missing > 0 else -1
            # What went one way does not come back, so that this ends.
            fitting = [
                one
                for one in self._able(changed, group, way)
                if self._mass(one) <= abs(missing) and moved.get(one, way) == way
            ]
            if not fitting:
                return steps
            one = draw.choice(fitting)
            changed, moved[one] = _moved(changed, one, way), way
            missing -= way * self._mass(one)
        return changed

    def _able(self, steps: Sequence[int], group: Sequence[Together], way: int) -> list[Together]:
        """Those of a group that can lose a step (1) or get one back (-1)."""
        if way < 0:
            return [one for one in group if all(steps[at] > self.least for at in one)]
        return [one for one in group if all(steps[at] < self.most[at] for at in one)]

    def _mass(self, one: Together) -> int:
        return sum(self.masses[at] for at in one)


def _moved(steps: Sequence[int], one: Together, way: int) -> list[int]:
    changed = list(steps)
    for at in one:
        changed[at] += way
    return changed


def next_tries(tried: Sequence[tuple[Steps, float]], exchanges: Exchanges, seed: int, number: int = 1) -> list[Steps]:
    """Change the best budget.

    Args:
        tried: budgets with their costs.
        exchanges: what may change places.
        seed: of what is drawn.
        number: how many are tried side by side.

    Returns:
        At most so many, the likeliest first, that were not tried yet, as far as there are any nearby; one at least.
    """
    best = min(tried, key=lambda one: one[1])
    known = {steps for steps, _ in tried}
    draw = random.Random(f"{seed} {len(tried)}")
    found = [exchanges.change(best[0], draw) for _ in range(GUESSED * number)]
    new = [*dict.fromkeys(steps for steps in found if steps not in known)] or found[:1]
    slopes = _slopes(tried, best)
    return sorted(new, key=lambda steps: float(_difference(steps, best[0]) @ slopes))[:number]


def _difference(steps: Steps, best: Steps) -> NDArray[np.float64]:
    return np.array(steps, dtype=np.float64) - np.array(best, dtype=np.float64)


def _slopes(tried: Sequence[tuple[Steps, float]], best: tuple[Steps, float]) -> NDArray[np.float64]:
    """What one more step of every part seems to cost, near the best budget; budgets far from it count less."""
    away = np.array([_difference(steps, best[0]) for steps, _ in tried])
    cost = np.array([found - best[1] for _, found in tried])
    weights = 1 / (1 + np.square(away).sum(axis=1))
    normal = (away * weights[:, None]).T @ away
    slopes: NDArray[np.float64] = np.linalg.solve(
        normal + RIDGE * np.eye(len(best[0])) * max(float(weights.mean()), 1e-9), (away * weights[:, None]).T @ cost
    )
    return slopes
