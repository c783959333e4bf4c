"""The report of a fit: the page with its picture, and the model card."""

from __future__ import annotations

import math
from collections.abc import Callable

from coprune.base.templating import render
from coprune.base.words import Sheet
from coprune.fitting.fit_result import Fitted, Row
from coprune.report.plot import Axis, Line, Plot, Point
from coprune.report.provenance import MadeFacts
from coprune.report.view import Lines, Page, Paragraph, Section, listed, made_parts

_NAMES = ("dense", "plain quants", "others", "chosen")
_COSTS = {"size": ("megabytes", 1e6), "memory": ("megabytes in memory", 1e6), "speed": ("tokens per second", 1.0)}


def fit_page(found: Fitted, model: str, target: str) -> str:
    """Return the page: the verdict, the picture, all candidates."""
    verdict = "met" if found.kept else "NOT met"
    said = f"the requirements are {verdict} on the unseen half" if found.better else found.verdict
    lead = Paragraph(f"{found.chosen}: {said}.", "" if found.kept else "warn")
    sections = [Section("Verdict", [Lines([*found.lines, *found.notes])])]
    if (drawn := _picture(found, target)) is not None:
        note = (
            "The margin is the distance to the limit of the first condition, with one-sided 95 % confidence bounds: on the "
            "unseen half for candidates that were tested there, otherwise on the seen items. A candidate meets the condition if "
            "its whole bar lies above the dashed line."
        )
        sections.append(Section("What was tried", [drawn], note))
    rows = sorted((row for row in found.rows if not row.refused), key=lambda row: row.bytes)
    columns: dict[str, Callable[[Row], str]] = {
        "candidate": lambda row: row.name + (" (chosen)" if row.chosen else ""),
        "MB": lambda row: f"{row.bytes / 1e6:.1f}",
        "tokens/s": lambda row: f"{row.speed:.0f}",
        "margin": lambda row: f"{row.bounds[1]:+.4f}" if row.bounds else "–",
        "at least": lambda row: f"{row.bounds[0]:+.4f}" if row.bounds else "–",
        "items": lambda row: row.part if row.bounds else "–",
        "verdict": lambda row: row.verdict or "not needed",
    }
    sections.append(Section("All candidates", [Sheet.of(rows, columns)]))
    sections += listed("Refused", [f"{row.name}: {row.refused}" for row in found.rows if row.refused])
    made = made_parts(MadeFacts.here())
    return Page("Fit", f"Fit of {model}", [lead, *made], sections, heading=f"{model}, for {target}").html()


def _picture(found: Fitted, target: str) -> Plot | None:
    """Plot the margin of the candidates over their cost, with bounds."""
    shown = [row for row in found.rows if all(math.isfinite(value) for value in row.bounds)]
    shown = [row for row in shown if row.bounds]
    if len(shown) < 2:
        return None
    name, unit = _COSTS[target]
    points, lines = list[Point](), list[Line]()
    # Clipped, since bounds from few items would flatten everything else.
    floor = min(0.0, 3 * min(row.bounds[1] for row in shown)) - 0.05
    ceiling = max(0.0, 3 * max(row.bounds[1] for row in shown)) + 0.05
    for row in sorted(shown, key=lambda row: not row.chosen):  # the chosen one is drawn and labelled first
        low, mean, high = row.bounds
        at = row.cost / unit
        tip = f"{row.name}: {mean:+.4f} ({low:+.4f} to {high:+.4f}) at {at:.1f} {name}"
        named = row.plain or row.foreign
        points.append(Point(at, mean, row.series, tip, "chosen" if row.chosen else row.name if named else ""))
        lines.append(Line([(at, max(low, floor)), (at, min(high, ceiling))], "reach"))
    heights = [height for line in lines for _, height in line.places] + [0.0]
    x = Axis.of(name, [row.cost / unit for row in shown], lambda value: f"{value:.4g}")
    y = Axis.of("margin", heights, lambda value: f"{value:+.3g}")
    lines.append(Line([(x.low, 0.0), (x.high, 0.0)], "required"))
    legend = [(f"dot s{series}", _NAMES[series]) for series in range(4) if any(row.series == series for row in shown)]
    return Plot(x, y, points, lines, legend)


def fit_card(found: Fitted, model: str) -> str:
    """Return the model card in Markdown."""
    return render("fitting/templates/fit_card.md.j2", found=found, model=model, folder=found.file.is_dir())
