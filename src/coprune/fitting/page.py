"""The report of a fit: the page with its picture, and the model card."""

from __future__ import annotations

import math

from coprune.fitting.result import Fitted
from coprune.report.html import MadeFacts, header, listed, made_lines, panel, section, table, text
from coprune.report.html import page as html_page
from coprune.report.plot import Axis, Line, Plot, Point

_NAMES = ("dense", "plain quants", "others", "chosen")
_COSTS = {"size": ("megabytes", 1e6), "memory": ("megabytes in memory", 1e6), "speed": ("tokens a second", 1.0)}


def page(found: Fitted, model: str, target: str) -> str:
    """Return the page: the verdict, the picture, all candidates."""
    verdict = "kept" if found.kept else "NOT kept"
    said = f"what is required is <b>{verdict}</b> on the unseen half" if found.better else f"<b>{found.verdict}</b>"
    lead = f"<p>{text(found.chosen)}: {said}.</p>"
    parts = [header("Fit", f"{model}, for {target}", lead, made_lines(MadeFacts.here()))]
    said = "".join(f"<li>{text(line)}</li>" for line in (*found.lines, *found.notes))
    parts.append(section("The last word", panel(f'<ul class="events">{said}</ul>')))
    if (drawn := _picture(found, target)) is not None:
        note = (
            "The margin is by how much the first condition is more than kept, with one-sided 95 % bounds: on the unseen half for "
            "those that were proven, else on the items that the search looked at. Kept is what lies above the dashed line with "
            "its whole bar."
        )
        parts.append(section("What was tried", panel(drawn), note=note))
    columns = ["candidate", "MB", "tokens/s", "margin", "at least", "items", "verdict"]
    rows = [
        [
            row.name + (" (chosen)" if row.chosen else ""),
            f"{row.bytes / 1e6:.1f}",
            f"{row.speed:.0f}",
            *([f"{row.bounds[1]:+.4f}", f"{row.bounds[0]:+.4f}", row.part] if row.bounds else ["–"] * 3),
            row.verdict or "not needed",
        ]
        for row in sorted((row for row in found.rows if not row.refused), key=lambda row: row.bytes)
    ]
    parts.append(section("All candidates", table(columns, rows)))
    parts.append(listed("Refused", [f"{row.name}: {row.refused}" for row in found.rows if row.refused]))
    return html_page(f"Fit of {model}", "\n".join(parts))


def _picture(found: Fitted, target: str) -> str | None:
    """Plot the cost against the difference to the dense model, with bounds."""
    shown = [row for row in found.rows if all(math.isfinite(value) for value in row.bounds)]
    shown = [row for row in shown if row.bounds]
    if len(shown) < 2:
        return None
    name, unit = _COSTS[target]
    points, lines = list[Point](), list[Line]()
    # With few items the bounds are so wide that they would flatten everything else.
    floor = min(0.0, 3 * min(row.bounds[1] for row in shown)) - 0.05
    ceiling = max(0.0, 3 * max(row.bounds[1] for row in shown)) + 0.05
    for row in sorted(shown, key=lambda row: not row.chosen):  # it is named and seen first
        low, mean, high = row.bounds
        at = row.cost / unit
        tip = f"{row.name}: {mean:+.4f} ({low:+.4f} to {high:+.4f}) at {at:.1f} {name}"
        points.append(Point(at, mean, row.series, tip, "chosen" if row.chosen else row.name if row.plain else ""))
        lines.append(Line([(at, max(low, floor)), (at, min(high, ceiling))], "reach"))
    heights = [height for line in lines for _, height in line.places] + [0.0]
    x = Axis.of(name, [row.cost / unit for row in shown], lambda value: f"{value:.4g}")
    y = Axis.of("margin", heights, lambda value: f"{value:+.3g}")
    lines.append(Line([(x.low, 0.0), (x.high, 0.0)], "required"))
    legend = [(f"dot s{series}", _NAMES[series]) for series in range(4) if any(row.series == series for row in shown)]
    return Plot(x, y, points, lines, legend).html()


def card(found: Fitted, model: str) -> str:
    """Return the model card, in Markdown."""
    verdict = "what was required is kept" if found.kept else "what was required is **not** kept"
    if not found.better:
        verdict = "nothing better than the model as it was given is proven, and this is its file, byte for byte"
    lines = "\n".join(f"- {line}" for line in (*found.lines, *found.notes))
    kind, run = "gguf", f"llama-cli -m {found.file.name}"
    if found.file.is_dir():
        kind, run = "transformers", f'import coprune; AutoModelForCausalLM.from_pretrained("{found.file.name}")'
    return (
        f"---\nlibrary_name: {kind}\ntags:\n- coprune\n- {kind}\n---\n\n# {found.file.name}\n\n"
        f"`{model}` as {found.chosen}, {found.bytes:,} bytes, found by `coprune fit`. On items that the search had "
        f"not seen, {verdict}:\n\n{lines}\n\nRun it: `{run}`. Make it again: "
        "`coprune fit recipe.yaml -o OUT`.\n"
    )
