"""The next budgets that a search tries: the best so far with some steps exchanged, the likeliest of several such.

What an exchange will do is guessed from all that was tried before: a straight line through the differences from the best,
which is pulled to zero where little is known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Steps = tuple[int, ...]
"""How many steps every part loses."""
GUESSED = 24
"""So many changed budgets are drawn for each that is tried, and those with the lowest guesses are."""
RIDGE = 1.0
"""How strongly guesses are pulled to zero, in squared steps."""
MOST_EXCHANGES = 6


def next_tries(
    tried: Sequence[tuple[Steps, float]],
    alike: Sequence[Sequence[int]],
    most: Sequence[int],
    seed: int,
    number: int = 1,
) -> list[Steps]:
    """Change the best budget.

    Args:
        tried: budgets with their costs.
        alike: numbers of the parts among which steps are exchanged.
        most: steps that every part can lose.
        seed: of what is drawn.
        number: how many are tried side by side.

    Returns:
        At most so many, the likeliest first, that were not tried yet, as far as there are any nearby; one at least.
    """
    best = min(tried, key=lambda one: one[1])
    known = {steps for steps, _ in tried}
    draw = random.Random(f"{seed} {len(tried)}")
    found = [_changed(best[0], alike, most, draw) for _ in range(GUESSED * number)]
    new = [*dict.fromkeys(steps for steps in found if steps not in known)] or found[:1]
    slopes = _slopes(tried, best)
    return sorted(new, key=lambda steps: float(_difference(steps, best[0]) @ slopes))[:number]


def _changed(steps: Steps, alike: Sequence[Sequence[int]], most: Sequence[int], draw: random.Random) -> Steps:
    """Some steps given back by parts and taken of others that are like them."""
    changed = list(steps)
    for _ in range(draw.randint(1, MOST_EXCHANGES)):
        group = draw.choice(alike)
        giving = [at for at in group if changed[at] > 0]
        taking = [at for at in group if changed[at] < most[at]]
        if giving and taking:
            back, more = draw.choice(giving), draw.choice(taking)
            if back != more:
                changed[back] -= 1
                changed[more] += 1
    return tuple(changed)


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
