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
"""Number of steps that every part loses."""
GUESSED = 24
"""Number of proposals per try, of which the one with the lowest predicted cost is tried."""
RIDGE = 1.0
"""Ridge penalty of the predictions, in squared steps."""
MOST_EXCHANGES = 6


@dataclass(frozen=True)
class Exchanges:
    """Steps of parts that may be exchanged, such that all parts together lose as much as before."""

    groups: Sequence[Sequence[int]]
    """Numbers of parts; among those of one group steps are exchanged."""
    most: Sequence[int]
    """Steps that every part can lose."""

    def change(self, steps: Steps, draw: random.Random) -> Steps:
        """Exchange some steps."""
        changed = list(steps)
        for _ in range(draw.randint(1, MOST_EXCHANGES)):
            self._exchange(changed, draw.choice(self.groups), draw)
        return tuple(changed)

    def _exchange(self, steps: list[int], group: Sequence[int], draw: random.Random) -> None:
        """Move one step from a part to another, in place."""
        giving = [part for part in group if steps[part] > 0]
        taking = [part for part in group if steps[part] < self.most[part]]
        if giving and taking:
            back, more = draw.choice(giving), draw.choice(taking)
            steps[back] -= 1
            steps[more] += 1


def next_tries(tried: Sequence[tuple[Steps, float]], exchanges: Exchanges, seed: int, number: int = 1) -> list[Steps]:
    """Propose variations of the best budget.

    Args:
        tried: budgets with their costs.
        exchanges: the allowed exchanges.
        seed: of the random choice.
        number: how many are tried side by side.

    Returns:
        At most `number` new budgets, the most promising first; at least one, tried before if no other is near.
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
    """Estimate the cost of one more step of every part, near the best budget; budgets far from it count less."""
    away = np.array([_difference(steps, best[0]) for steps, _ in tried])
    cost = np.array([found - best[1] for _, found in tried])
    weights = 1 / (1 + np.square(away).sum(axis=1))
    normal = (away * weights[:, None]).T @ away
    slopes: NDArray[np.float64] = np.linalg.solve(
        normal + RIDGE * np.eye(len(best[0])) * max(float(weights.mean()), 1e-9), (away * weights[:, None]).T @ cost
    )
    return slopes
