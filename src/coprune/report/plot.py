"""A chart with two axes; positions are in per cent of its width and height."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TICKS = 5
_CLOSE = 6.0  # height of a name, in per cent
_LETTER = 0.8  # width of a letter, in per cent


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, linear or logarithmic, with labelled ticks."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    ratios: bool = False

    @classmethod
    def of(cls, title: str, values: Sequence[float], show: Callable[[float], str], ratios: bool = False) -> Axis:
        """Return an axis for some values. show: formats one; ratios: logarithmic, for values above 0."""
        low, high = min(values), max(values)
        if ratios:
            room = max((high / low) ** 0.08, 1.02)
            low, high = low / room, high * room
        else:
            room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
            # The axis does not extend below zero unless a value does.
            low, high = low - room if low < 0 else max(0.0, low - room), high + room
        places = _by_ratio(low, high) if ratios else _even(low, high)
        return cls(title, low, high, [(place, show(place)) for place in places], ratios)

    def at(self, value: float) -> float:
        """Return the position of a value, in per cent of the axis."""
        low, high, value = (math.log(one) if self.ratios else one for one in (self.low, self.high, value))
        return 100 * (value - low) / (high - low)


@dataclass(frozen=True)
class Point:
    """A point. name: its label; mark: the label if there is no room; tip: the tooltip."""

    x: float
    y: float
    series: int
    tip: str
    name: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Dot:
    """A point at its drawn position, in per cent. before: whether the label is on its left; named_at: the label's height."""

    point: Point
    left: float
    top: float
    before: bool
    named_at: float | None


@dataclass(frozen=True)
class Line:
    """A line through points. kind: its class in page.css."""

    places: Sequence[tuple[float, float]]
    kind: str


@dataclass(frozen=True)
class Plot:
    """Points and lines between two axes."""

    x: Axis
    y: Axis
    points: Sequence[Point] = ()
    lines: Sequence[Line] = ()
    legend: Sequence[tuple[str, str]] = ()
    """CSS class and name of each kind of point or line."""

    def margin(self) -> int:
        """Return the width of the y axis labels, in letters."""
        return 1 + max((len(shown) for _, shown in self.y.ticks), default=1)

    def grid(self) -> str:
        """Return a line for every tick as an SVG path."""
        rows = "".join(f"M0 {100 - self.y.at(at):.1f}H100" for at, _ in self.y.ticks)
        return rows + "".join(f"M{self.x.at(at):.1f} 0V100" for at, _ in self.x.ticks)

    def path(self, line: Line) -> str:
        """Return a line as an SVG path."""
        return "M" + "L".join(f"{self.x.at(x):.1f} {100 - self.y.at(y):.1f}" for x, y in line.places)

    def dots(self) -> list[Dot]:
        """Return the points, each labelled if its name covers no other."""
        dots, taken = list[Dot](), [(self.x.at(p.x), self.x.at(p.x), 100 - self.y.at(p.y)) for p in self.points]
        for point in self.points:
            left, top = self.x.at(point.x), 100 - self.y.at(point.y)
            length, before = _LETTER * (len(point.name) + 3), left > 55
            ends = (left - length, left - 1) if before else (left + 1, left + length)
            # Try above the point first, where a line through the points does not cross the name.
            places = (top + off * _CLOSE for off in (-0.8, 0.8, -1.8, 1.8) if point.name)
            free = (at for at in places if 0 <= at <= 100 and not any(_covers(ends, at, other) for other in taken))
            named_at = next(free, None)
            taken += [] if named_at is None else [(*ends, named_at)]
            dots.append(Dot(point, left, top, before, named_at))
        return dots


def _covers(ends: tuple[float, float], top: float, other: tuple[float, float, float]) -> bool:
    return ends[0] < other[1] + 1 and other[0] - 1 < ends[1] and abs(top - other[2]) < _CLOSE


def _even(low: float, high: float) -> list[float]:
    """Return about five round numbers between two values."""
    rough = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = min((m * size for m in (1.0, 2.0, 2.5, 5.0, 10.0)), key=lambda step: abs(step - rough))
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _by_ratio(low: float, high: float) -> list[float]:
    """Return a few round numbers between two values, spaced by ratio."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) >= 3:
            every = -(-len(found) // (2 * _TICKS))
            return found[::every]
    return _even(low, high)
