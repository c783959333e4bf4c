"""How many channels and heads each block keeps, when all blocks together keep a certain number.

Parts are spread in groups of parts that are alike: as many units in each, of the same size. Whole steps are spread, a step
being as many units as `align` says, and every part keeps one at least.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from coprune.base.options import require_not_negative, with_options
from coprune.pruning.allocation.search import Search
from coprune.pruning.allocation.uniform import Uniform
from coprune.recipe.choice import Choice


@dataclass(frozen=True)
class ByError:
    """Remove what costs least: the relative errors of the consumers' outputs, as measured on the dense model.

    Errors of different blocks are made comparable by what the cut of each block alone does to the model's distributions.
    """

    tokens: int = 1024
    """Of the calibration, at least so many are run for that (of images: one batch); 0: errors count by `movement`."""
    movement: float = 1.0
    """With 0 tokens, errors count by what their block changes in the hidden states, to this power; 0: all blocks alike."""

    def __post_init__(self) -> None:
        require_not_negative(tokens=self.tokens, movement=self.movement)


SPREADINGS: dict[str, Uniform | ByError | Search] = {"uniform": Uniform(), "error": ByError(), "search": Search()}
"""Every way to spread units over the blocks, by its name."""


def spreading_named(asked: Choice) -> Uniform | ByError | Search:
    """Look a way up; what spreads zeros alone is uniform for units. Raises BadInput for an option that there is not."""
    if asked.name not in SPREADINGS:
        return SPREADINGS["uniform"]
    found = with_options(SPREADINGS[asked.name], "allocation", asked.name, asked.options)
    if isinstance(found, Search):
        found.require_end()
    return found


def cheapest(costs: Sequence[Sequence[float]], steps: int) -> list[int]:
    """Take steps where they cost least, along the convex curves below the measured ones.

    Args:
        costs: of every part, what it costs to take 0, 1, 2 … steps.
        steps: how many are taken altogether.

    Returns:
        How many steps are taken of every part.
    """
    slopes = [_slopes(own) for own in costs]
    taken = [0] * len(costs)
    queue = [(own[0], part) for part, own in enumerate(slopes) if own]
    heapq.heapify(queue)
    for _ in range(steps):
        _, part = heapq.heappop(queue)
        taken[part] += 1
        if taken[part] < len(slopes[part]):
            heapq.heappush(queue, (slopes[part][taken[part]], part))
    return taken


def _slopes(costs: Sequence[float]) -> list[float]:
    """What each step costs on the largest convex curve below the costs, ascending."""
    found: list[float] = []
    start = 0
    while start < len(costs) - 1:
        slope, end = min(((costs[i] - costs[start]) / (i - start), i) for i in range(start + 1, len(costs)))
        found += [slope] * (end - start)
        start = end
    return found
