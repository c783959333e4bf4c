"""A chart with two axes: lines in SVG that stretches to any width, and points, ticks and names as HTML that never does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coprune.base.words import per_cent
from coprune.report.html import panel, section, text

_TICKS = 5
_CLOSE = 6.0  # per cent of the height that a name takes
_LETTER = 0.8  # per cent of the width that one of its letters takes


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
        """Return the chart as HTML."""
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
        """Return points, the first on top, each with its name where that covers no other's."""
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
        return dots[::-1]


def _covers(ends: tuple[float, float], top: float, other: tuple[float, float, float]) -> bool:
    return ends[0] < other[1] + 1 and other[0] - 1 < ends[1] and abs(top - other[2]) < _CLOSE


def _even(low: float, high: float) -> list[float]:
    """Return about five round figures between two others."""
    rough = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = min((m * size for m in (1.0, 2.0, 2.5, 5.0, 10.0)), key=lambda step: abs(step - rough))
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _by_ratio(low: float, high: float) -> list[float]:
    """Return a few round figures between two others, spaced by ratios."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) >= 3:
            every = -(-len(found) // (2 * _TICKS))
            return found[::every]
    return _even(low, high)


_NAMED = 8  # more points than these bear their names only on the front
_FIRST = ("dense", "baseline")  # what the others are held against
_COLOURS = 6  # series of points that page.css tells apart


@dataclass(frozen=True)
class Reached:
    """The result of one model. value: a perplexity or an accuracy; size: bytes on disk; mark: its number in the table."""

    name: str
    method: str
    value: float
    zeros: float
    size: int | None
    mark: str = ""


def fronts(title: str, note: str, found: Sequence[Reached], less: bool = True) -> list[str]:
    """Return sections with a chart against sparsity, and one against size where sizes differ. less: whether less is better."""
    drawn = [one for one in found if math.isfinite(one.value)]
    note = note if len(drawn) == len(found) else f"{note} What is infinite is not drawn."
    if not drawn:
        return []
    zeros = _plot(drawn, title, ("zeros among all parameters", lambda one: one.zeros, _percent), (less, False))
    parts = [section(f"{title} against sparsity", panel(zeros), note=f"{note} The line joins the front.")]
    sized = [one for one in drawn if one.size is not None]
    if len({one.size for one in sized}) > 1:
        by_size = _plot(sized, title, ("size on disk", lambda one: float(one.size or 0), _bytes), (less, True))
        parts.append(section(f"{title} against size", panel(by_size), note=note))
    return parts


def _plot(
    found: Sequence[Reached],
    title: str,
    across: tuple[str, Callable[[Reached], float], Callable[[float], str]],
    less: tuple[bool, bool],
) -> str:
    """Return the chart. across: title, position and format of the x axis; less: whether less is better, of y and x."""
    name, place, show = across
    front = [one for one in found if not any(_beats(other, one, place, less) for other in found)]
    methods = list(dict.fromkeys(one.method for one in found if one.method not in _FIRST))
    series = dict.fromkeys(_FIRST, 0) | {method: 1 + index % _COLOURS for index, method in enumerate(methods)}
    value = _short if less[0] else _percent
    points = [
        Point(
            place(one),
            one.value,
            series[one.method],
            f"{one.name}: {value(one.value)} at {show(place(one))} {name}",
            one.name if one in front or len(found) <= _NAMED else "",
            one.mark,
        )
        for one in found
    ]
    ratios = less[0] and min(one.value for one in found) > 0
    y = Axis.of(title, [one.value for one in found], value, ratios)
    x = Axis.of(name, [place(one) for one in found], show)
    line = Line(sorted((place(one), one.value) for one in front), "front")
    legend = [(f"dot s{series[method]}", method) for method in series if any(one.method == method for one in found)]
    return Plot(x, y, points, [line], legend).html()


def _beats(one: Reached, other: Reached, place: Callable[[Reached], float], less: tuple[bool, bool]) -> bool:
    """Return whether a model is at least as good in both quantities and better in one."""
    signs = [1 if smaller else -1 for smaller in less]
    ours, theirs = ((signs[0] * it.value, signs[1] * place(it)) for it in (one, other))
    return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]


def _percent(share: float) -> str:
    return per_cent(share, 0 if abs(100 * share - round(100 * share)) < 1e-6 else 2)


def _short(value: float) -> str:
    return f"{value:.4g}" if value < 1e5 else f"{value:.1e}"


def _bytes(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
