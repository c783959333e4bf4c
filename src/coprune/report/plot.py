"""A chart with two axes: lines in SVG that stretches to any width, and points, ticks and names as HTML that never does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coprune.report.html import text

_TICKS = 5
_CLOSE = 6.0  # per cent of the height that a name takes
_LETTER = 0.8  # per cent of the width that one of its letters takes


@dataclass(frozen=True)
class Axis:
    """What is between `low` and `high`, by equal steps or equal ratios, with what stands at its ticks."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    ratios: bool = False

    @classmethod
    def of(cls, title: str, values: Sequence[float], show: Callable[[float], str], ratios: bool = False) -> Axis:
        """An axis that fits some values. show: how one is written; ratios: by equal ratios, for values above 0."""
        low, high = min(values), max(values)
        if ratios:
            room = max((high / low) ** 0.08, 1.02)
            low, high = low / room, high * room
        else:
            room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
            # Nothing is below zero where nothing that is shown is.
            low, high = low - room if low < 0 else max(0.0, low - room), high + room
        places = _by_ratio(low, high) if ratios else _even(low, high)
        return cls(title, low, high, [(place, show(place)) for place in places], ratios)

    def at(self, value: float) -> float:
        """Where a value is, in per cent of the axis."""
        low, high, value = (math.log(one) if self.ratios else one for one in (self.low, self.high, value))
        return 100 * (value - low) / (high - low)


@dataclass(frozen=True)
class Point:
    """A point. name: what stands beside it, `mark` where there is no room for that; tip: what the pointer shows."""

    x: float
    y: float
    series: int
    tip: str
    name: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Line:
    """A line through some places. kind: its class in page.css."""

    places: Sequence[tuple[float, float]]
    kind: str


@dataclass(frozen=True)
class Plot:
    """Points and lines between two axes. legend: what each series is called."""

    x: Axis
    y: Axis
    points: Sequence[Point] = ()
    lines: Sequence[Line] = ()
    legend: Sequence[tuple[str, str]] = field(default=())
    """Class and name of each kind of point or line."""

    def html(self) -> str:
        """The chart as HTML."""
        legend = "".join(f'<span><i class="{kind}"></i>{text(name)}</span>' for kind, name in self.legend)
        legend = f'<div class="legend">{legend}</div>' if legend else ""
        wide = max((len(shown) for _, shown in self.y.ticks), default=1)
        return (
            f'{legend}<div class="plot" style="--left:{wide + 1}ch"><div class="title">{text(self.y.title)}</div>'
            f'<div class="area">{self._drawn()}{self._labels()}{"".join(self._dots())}</div>'
            f'<div class="title below">{text(self.x.title)}</div></div>'
        )

    def _drawn(self) -> str:
        grid = "".join(f"M0 {100 - self.y.at(at):.1f}H100" for at, _ in self.y.ticks)
        grid += "".join(f"M{self.x.at(at):.1f} 0V100" for at, _ in self.x.ticks)
        lines = "".join(f'<path class="{line.kind}" d="M{self._path(line)}"/>' for line in self.lines if line.places)
        return f'<svg viewBox="0 0 100 100" preserveAspectRatio="none"><path class="grid" d="{grid}"/>{lines}</svg>'

    def _path(self, line: Line) -> str:
        return "L".join(f"{self.x.at(x):.1f} {100 - self.y.at(y):.1f}" for x, y in line.places)

    def _labels(self) -> str:
        rows = [
            f'<span class="y" style="top:{100 - self.y.at(at):.1f}%">{text(shown)}</span>' for at, shown in self.y.ticks
        ]
        rows += [
            f'<span class="x" style="left:{self.x.at(at):.1f}%">{text(shown)}</span>' for at, shown in self.x.ticks
        ]
        return "".join(rows)

    def _dots(self) -> list[str]:
        """Points, each with its name where that does not cover another one's."""
        dots, taken = [], [(self.x.at(point.x), self.x.at(point.x), 100 - self.y.at(point.y)) for point in self.points]
        for point in self.points:
            left, top = self.x.at(point.x), 100 - self.y.at(point.y)
            place = f"left:{left:.1f}%;top:{top:.1f}%"
            dots.append(f'<i class="dot s{point.series}" style="{place}" title="{text(point.tip)}"></i>')
            if not point.name:
                continue
            length, before = _LETTER * (len(point.name) + 3), left > 55
            ends = (left - length, left - 1) if before else (left + 1, left + length)
            # Above its point first, where a line through the points does not cross it.
            for off in (-0.8 * _CLOSE, 0.8 * _CLOSE, -1.8 * _CLOSE, 1.8 * _CLOSE):
                if 0 <= top + off <= 100 and not any(_covers(ends, top + off, other) for other in taken):
                    taken.append((*ends, top + off))
                    place = f"left:{left:.1f}%;top:{top + off:.1f}%"
                    shown = f"<span>{text(point.name)}</span>" + (f"<b>{text(point.mark)}</b>" if point.mark else "")
                    dots.append(f'<span class="{"name before" if before else "name"}" style="{place}">{shown}</span>')
                    break
        return dots


def _covers(ends: tuple[float, float], top: float, other: tuple[float, float, float]) -> bool:
    return ends[0] < other[1] + 1 and other[0] - 1 < ends[1] and abs(top - other[2]) < _CLOSE


def _even(low: float, high: float) -> list[float]:
    """About five round figures between two others."""
    rough = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = min((m * size for m in (1.0, 2.0, 2.5, 5.0, 10.0)), key=lambda step: abs(step - rough))
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _by_ratio(low: float, high: float) -> list[float]:
    """A few round figures between two others, spread by ratios."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) >= 3:
            every = -(-len(found) // (2 * _TICKS))
            return found[::every]
    return _even(low, high)
