"""Charts of quality against cost, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coprune.base.words import per_cent
from coprune.report.plot import Axis, Line, Plot, Point
from coprune.report.view import Section

_NAMED = 8  # with more points, only those on the front are named
_FIRST = ("dense", "baseline")  # references, drawn in their own colour
_COLOURS = 6  # series that page.css distinguishes


@dataclass(frozen=True)
class Reached:
    """The result of one model. value: perplexity or accuracy; size: bytes on disk; mark: number in the table."""

    name: str
    method: str
    value: float
    zeros: float
    size: int | None
    mark: str = ""


def fronts(title: str, note: str, found: Sequence[Reached], less: bool = True) -> list[Section]:
    """Return sections with a chart against sparsity, and one against size if sizes differ. less: whether lower is better."""
    drawn = [one for one in found if math.isfinite(one.value)]
    note = note if len(drawn) == len(found) else f"{note} Infinite values are not drawn."
    if not drawn:
        return []
    zeros = _plot(drawn, title, ("zeros among all parameters", lambda one: one.zeros, _percent), (less, False))
    parts = [Section(f"{title} against sparsity", [zeros], f"{note} The line joins the Pareto front.")]
    sized = [one for one in drawn if one.size is not None]
    if len({one.size for one in sized}) > 1:
        by_size = _plot(sized, title, ("size on disk", lambda one: float(one.size or 0), _bytes), (less, True))
        parts.append(Section(f"{title} against size", [by_size], note))
    return parts


def _plot(
    found: Sequence[Reached],
    title: str,
    across: tuple[str, Callable[[Reached], float], Callable[[float], str]],
    less: tuple[bool, bool],
) -> Plot:
    """Return the chart. across: title, position and format of the x axis; less: whether lower is better, for y and x."""
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
    return Plot(x, y, points, [line], legend)


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
