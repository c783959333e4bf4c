"""One-sided confidence bounds on a comparison of two models over all items like the measured ones.

Every estimate assumes independently drawn items; near-duplicates count as one item.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95
"""A bound is wrong in at most one of twenty repetitions."""
LEAST_ITEMS = 8
"""Minimum number of items for a meaningful spread."""
_MOST_ITEMS = 1 << 24
_PRECISION = 1e-9
_CORRECTION = 0.5
"""Continuity correction of counts, in items."""


@dataclass(frozen=True)
class Bounds:
    """An estimate with its lower and upper bound, each at the one-sided level."""

    mean: float
    low: float
    high: float
    items: int


class Estimate(ABC):
    """A quantity over all items, estimated from a sample."""

    items: float
    span: tuple[float, float] = (-1.0, 1.0)
    """The range of the quantity."""

    @property
    @abstractmethod
    def mean(self) -> float:
        """The estimate."""

    @abstractmethod
    def is_above(self, value: float, level: float = LEVEL) -> bool:
        """Return whether the quantity is proven to be at least a value, with error probability at most 1 − level."""

    @abstractmethod
    def high(self, level: float = LEVEL) -> float:
        """Return the upper bound."""

    @abstractmethod
    def needed(self, value: float) -> int | None:
        """Return how many items like these would prove at least a value; None if no number would."""

    def bounds(self, level: float = LEVEL) -> Bounds:
        """Return the lower and the upper bound. level: one-sided, of each."""
        if not self.items:
            return Bounds(math.nan, -math.inf, math.inf, 0)
        low = _last(lambda value: self.is_above(value, level), *self.span)
        return Bounds(self.mean, low, self.high(level), int(self.items))


def _last(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return the largest value for which a condition holds, or the lowest if it holds for none."""
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class _Counts(Estimate):
    """Counts of items by which of two models answers them correctly; they need not be whole numbers."""

    both: float
    gained: float
    """Items that only the new model answers correctly."""
    lost: float
    """Items that only the old model answers correctly."""
    items: float

    def needed(self, value: float) -> int | None:
        """Return the number of items needed at these proportions."""
        if not self.items or not self.mean > value:
            return None

        def holds(items: int) -> bool:
            by = items / self.items
            more = replace(self, both=self.both * by, gained=self.gained * by, lost=self.lost * by, items=items)
            return more.is_above(value)

        high = 1
        while not holds(high):
            high *= 2
            if high > _MOST_ITEMS:
                return None
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high

    def is_above(self, value: float, level: float = LEVEL) -> bool:
        """Compare the score with the normal quantile."""
        return self._score(value, -_CORRECTION) > NormalDist().inv_cdf(level)

    def is_below(self, value: float, level: float = LEVEL) -> bool:
        """Return whether the quantity is proven to be at most a value."""
        return -self._score(value, _CORRECTION) > NormalDist().inv_cdf(level)

    def high(self, level: float = LEVEL) -> float:
        """Return the smallest proven upper bound."""
        least, most = self.span
        return -_last(lambda value: self.is_below(-value, level), -most, -least)

    @abstractmethod
    def _score(self, value: float, correction: float) -> float:
        """Return the distance from a value, in standard errors estimated under that value."""


class Difference(_Counts):
    """Accuracy of the new model minus the old one's: Tango's score interval for paired proportions.

    With b items gained and c lost of n, the score of a difference δ is (b − c − nδ ∓ ½) / √(n (2q + δ(1 − δ))). Here q is the
    maximum-likelihood share of lost items given δ: the positive root of
    2n q² + (−b − c + (2n − b + c) δ) q − c δ (1 − δ). (Statistics in Medicine 17 (1998) 891–908. The continuity correction is
    added here: half an item, or one item if every item differs.)
    """

    @property
    def mean(self) -> float:
        """Difference of the shares."""
        return (self.gained - self.lost) / self.items if self.items else math.nan

    def _score(self, value: float, correction: float) -> float:
        gained, lost, items = self.gained, self.lost, self.items
        second = -gained - lost + (2 * items - gained + lost) * value
        third = -lost * value * (1 - value)
        loses = (math.sqrt(max(0.0, second**2 - 8 * items * third)) - second) / (4 * items) if items else 0.0
        if gained + lost == items:  # then changing one answer moves the difference by two items
            correction *= 2
        return _standardised(gained - lost - items * value + correction, items * (2 * loses + value * (1 - value)))


class Ratio(_Counts):
    """Accuracy of the new model over the old one's: Nam and Blackwelder's score interval for a ratio of paired proportions.

    Items that both answer incorrectly carry no information. Of the N others, a are answered correctly by both models, b only by
    the new one, c only by the old one. The ratio ρ satisfies P(a) + P(b) = ρ (P(a) + P(c)); with q = P(b),
    P(a) = ρ − (1 + ρ) q and P(c) = 1 − ρ + ρ q. The likelihood a ln P(a) + b ln P(b) + c ln P(c) is largest at a root of a
    quadratic equation. With these shares the score is (a + b − ρ (a + c) ∓ ½) / √(N (P(a) (1 − ρ)² + P(b) + P(c) ρ²)).
    (Statistics in Medicine 21 (2002) 689–699. The continuity correction of half an item is added here; with it the error,
    enumerated over all outcomes, stays below 5 %.)
    """

    span = (_PRECISION, 10.0)

    @property
    def mean(self) -> float:
        """Ratio of the shares."""
        old, new = self.both + self.lost, self.both + self.gained
        return new / old if old else math.inf if new else math.nan

    def _score(self, value: float, correction: float) -> float:
        both, gained, lost = self.both, self.gained, self.lost
        some = both + gained + lost
        # The likelihood's derivative times -q P(a) P(c): first q² + second q + third.
        first = value * (1 + value) * some
        second = (1 - value**2) * (both + gained) - value**2 * (gained + lost)
        third = -gained * value * (1 - value)
        root = math.sqrt(max(0.0, second**2 - 4 * first * third))
        gains = (root - second) / (2 * first) if some else 0.0
        gains = min(max(gains, (value - 1) / value, 0.0), value / (1 + value))
        keeps, loses = value - (1 + value) * gains, 1 - value + value * gains
        variance = some * (keeps * (1 - value) ** 2 + gains + loses * value**2)
        return _standardised(both + gained - value * (both + lost) + correction, variance)


class Share(_Counts):
    """Accuracy of one model: Clopper and Pearson's exact bound (Biometrika 26 (1934) 404–413), by the binomial distribution."""

    span = (0.0, 1.0)

    @property
    def mean(self) -> float:
        """Share of correct answers."""
        return (self.both + self.gained) / self.items if self.items else math.nan

    def is_above(self, value: float, level: float = LEVEL) -> bool:
        """Return whether this many correct answers would be rare at a smaller share."""
        from scipy.special import betainc  # slow to import and rarely needed

        right = self.both + self.gained
        rare = 1.0 if right <= 0 else float(betainc(right, self.items - right + 1, value))
        return rare <= 1 - level

    def is_below(self, value: float, level: float = LEVEL) -> bool:
        """Return whether this many wrong answers would be rare at a larger share."""
        return replace(self, both=self.items - self.both - self.gained, gained=0.0).is_above(1 - value, level)

    def _score(self, value: float, correction: float) -> float:
        raise NotImplementedError


def _standardised(above: float, variance: float) -> float:
    return above / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, above)


_BETS = np.linspace(0.01, 0.99, 99)
_OPINION = np.log1p(0.1 * _BETS) + 0.01 * np.log1p(-_BETS)
"""Prior of the bets: as if one item had won a tenth of the range and a hundredth of an item had lost all of it."""


class Mean(Estimate):
    """Mean of figures with a floor: a bound by betting (Waudby-Smith and Ramdas, JRSS B 86 (2024) 1–27).

    Against the claim that the mean is at most m, a gambler bets a share λ ∈ [0, 1) of the capital before each item: with
    y = (x − m) / (m − floor) ≥ −1 the capital is multiplied by 1 + λ y. If the claim is true, the capital does not grow on
    average, so it reaches 20 times its start with probability at most 1/20 (Ville), whatever the distribution above the floor.
    λ is the share that would have grown the capital most on the earlier items, so it depends on no later item. Figures below
    the floor, and NaN, count as the floor: what is proven is a bound on the mean of max(x, floor). Nothing is proven if the
    mean itself is lower.
    """

    def __init__(self, values: Sequence[float], floor: float) -> None:
        """Estimate the mean of values, whose order must not depend on them."""
        self.values, self.floor, self.items = np.asarray(values, dtype=np.float64), floor, len(values)
        self.span = (floor + _PRECISION, max(self.mean, floor + 2 * _PRECISION))

    @property
    def mean(self) -> float:
        """The mean without the floor."""
        return math.fsum(self.values) / len(self.values) if len(self.values) else math.nan

    @property
    def beyond(self) -> int:
        """Number of figures that count as the floor."""
        return int((~(self.values >= self.floor)).sum())

    def is_above(self, value: float, level: float = LEVEL) -> bool:
        """Return whether the capital reached 1 / (1 − level)."""
        return self._ruined(value, level) is not None

    def high(self, level: float = LEVEL) -> float:
        """Return Student's upper bound, an approximation that only serves to reject candidates early."""
        from scipy.special import stdtrit  # slow to import and rarely needed

        count = len(self.values)
        if count < LEAST_ITEMS or not math.isfinite(self.mean):
            return self.mean if count >= LEAST_ITEMS and self.mean < 0 else math.inf
        reach = float(stdtrit(count - 1, level)) * float(self.values.std(ddof=1)) / math.sqrt(count)
        return self.mean + reach

    def needed(self, value: float) -> int | None:
        """Return the number of items needed; beyond the given ones, extrapolate the growth of the best bet."""
        if not self.mean > value or not value > self.floor:
            return None
        if (first := self._ruined(value, LEVEL)) is not None:
            return first
        growth = np.log1p(np.outer(self._won(value), _BETS)).mean(axis=0).max()
        if not growth > 0:
            return None
        more = (math.log(1 / (1 - LEVEL)) - self._capital(value)[-1]) / growth
        return None if more > _MOST_ITEMS else len(self.values) + max(1, math.ceil(more))

    def _ruined(self, value: float, level: float) -> int | None:
        """Return the number of items after which a smaller mean was refuted, or None."""
        if not self.mean >= value or not value > self.floor:
            return None
        reached = np.flatnonzero(self._capital(value) >= math.log(1 / (1 - level)))
        return int(reached[0]) + 1 if len(reached) else None

    def _capital(self, value: float) -> Array:
        """Return the logarithm of the capital after each item."""
        growth = np.log1p(np.outer(self._won(value), _BETS))
        before = _OPINION + np.concatenate([np.zeros((1, len(_BETS))), growth[:-1].cumsum(axis=0)])
        bets: Array = growth[np.arange(len(growth)), before.argmax(axis=1)]
        return bets.cumsum()

    def _won(self, value: float) -> Array:
        """Return each figure's distance above a value, in units of the value's distance above the floor."""
        counted: Array = np.where(self.values >= self.floor, self.values, self.floor)
        return (counted - value) / (value - self.floor)
