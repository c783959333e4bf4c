"""One-sided bounds of a mean difference between two models that answered the same items."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95
"""A bound is wrong in one of twenty repetitions at most."""
LEAST_ITEMS = 8
"""Items below which a spread says nothing."""
_MOST_ITEMS = 1 << 24


@dataclass(frozen=True)
class Bounds:
    """A mean over items, and what it is at least and at most, each at the one-sided level."""

    mean: float
    low: float
    high: float
    items: int


def bounds_of(differences: Sequence[float], of_answers: bool = False, level: float = LEVEL) -> Bounds:
    """Return confidence bounds of the mean of the population that items were drawn from.

    Differences of right and wrong answers (-1, 0, 1) get Tango's score interval for paired proportions (1998) with a continuity
    correction, which holds where few or no items differ; all others get Student's.

    Args:
        differences: one of every item.
        of_answers: whether they are of right and wrong answers; not inferred from the values, which may all be zero.
        level: one-sided, of either bound.

    Returns:
        The mean and its bounds; infinite ones for fewer than eight items.
    """
    count = len(differences)
    if not count:
        return Bounds(math.nan, -math.inf, math.inf, 0)
    mean = math.fsum(differences) / count
    if of_answers:
        seen = Counter(differences)
        gained, lost = seen[1], seen[-1]
        return Bounds(mean, *_both(gained, lost, count, level), count)
    if count < LEAST_ITEMS or not math.isfinite(mean):
        return Bounds(mean, -math.inf, math.inf, count)
    reach = _student(count - 1, level) * _deviation(differences, mean) / math.sqrt(count)
    return Bounds(mean, mean - reach, mean + reach, count)


def _student(freedom: int, level: float) -> float:
    """Return a quantile of Student's distribution."""
    from scipy.special import stdtrit  # takes longer to import than most need it

    return float(stdtrit(freedom, level))


def _both(gained: int, lost: int, items: int, level: float) -> tuple[float, float]:
    return score_bound(gained, lost, items, level), -score_bound(lost, gained, items, level)


def _deviation(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def score_bound(gained: float, lost: float, items: float, level: float = LEVEL) -> float:
    """Return what the difference of two paired proportions is at least.

    Args:
        gained: items that only the new model answers rightly.
        lost: items that only the old one does.
        items: all.
        level: of the bound.
    """
    low, high, errors = -1.0, 1.0, NormalDist().inv_cdf(level)
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _score(gained, lost, items, middle) > errors:
            low = middle
        else:
            high = middle
    return low


def _score(gained: float, lost: float, items: float, difference: float) -> float:
    """Return the distance of the items from a difference in standard errors, with that difference as the truth."""
    second = -gained - lost + (2 * items - gained + lost) * difference
    third = -lost * difference * (1 - difference)
    loses = (math.sqrt(max(0.0, second**2 - 8 * items * third)) - second) / (4 * items)
    variance = items * (2 * loses + difference * (1 - difference))
    above = gained - lost - items * difference - 0.5
    return above / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, above)


def items_needed(differences: Sequence[float], least: float, of_answers: bool = False) -> int | None:
    """Return how many items like these would prove that their mean is at least a number; None where none would.

    Args:
        differences: of items like those.
        least: what is to be proven.
        of_answers: as in `bounds_of`.
    """
    seen = bounds_of(differences, of_answers)
    if not seen.items or not seen.mean > least:
        return None
    if of_answers:
        counts = Counter(differences)
        gained, lost = counts[1] / seen.items, counts[-1] / seen.items

        def holds(items: int) -> bool:
            return score_bound(gained * items, lost * items, items) >= least
    else:
        spread = _deviation(differences, seen.mean) if seen.items > 1 else math.inf

        def holds(items: int) -> bool:
            reach = _student(max(1, items - 1), LEVEL) * spread / math.sqrt(items)
            return items >= LEAST_ITEMS and seen.mean - reach >= least

    high = LEAST_ITEMS
    while not holds(high):
        high *= 2
        if high > _MOST_ITEMS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
