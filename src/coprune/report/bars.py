"""Bars that are compared within a group, such as a text's perplexities: name, bar and figure of each, in HTML alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coprune.report.html import panel, text


@dataclass(frozen=True)
class Bar:
    """A figure. kind: `dense`, `pruned` or `tuned`, by which it is coloured; reach: an interval to draw over its end."""

    name: str
    kind: str
    value: float
    shown: str
    reach: tuple[float, float] | None = None


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], top: float | None = None) -> str:
    """Groups of bars, each with its title.

    top: where all bars end; without, those of each group end at its largest figure, so that groups need not compare.
    """
    return panel('<div class="bars">', *(_group(title, group, top) for title, group in groups if group), "</div>")


def _group(title: str, group: Sequence[Bar], top: float | None) -> str:
    ends = [end for bar in group for end in (bar.value, *(bar.reach or ())) if math.isfinite(end)]
    whole = top or max(ends, default=1.0) or 1.0
    rows = "".join(_bar(bar, whole) for bar in group)
    return f'<div class="group"><div class="of">{text(title)}</div>{rows}</div>'


def _bar(bar: Bar, whole: float) -> str:
    reach = ""
    if bar.reach is not None:
        low, high = (_share(end, whole) for end in bar.reach)
        reach = f'<b style="left:{low:.1f}%;width:{high - low:.1f}%"></b>'
    length = _share(bar.value, whole)
    return (
        f'<span class="tag {bar.kind}">{text(bar.name)}</span><div class="track">'
        f'<i class="{bar.kind}" style="width:{length:.1f}%"></i>{reach}</div><span class="value">{text(bar.shown)}</span>'
    )


def _share(value: float, whole: float) -> float:
    return 100.0 if not math.isfinite(value) else 100 * min(1.0, max(0.0, value / whole))
