"""Two pictures for tables of sizes and speeds: perplexity against bytes, and against tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt


def beside(sides: Sequence[tuple[list[dict[str, Any]], str, str]], shape: str, kinds: list[str]) -> alt.VConcatChart:
    """Perplexity of rows against two of their fields, one below the other so that a phone shows them in readable letters.

    sides: for each picture its rows, the field along x and that axis's title. A row has `perplexity`, `kind` (its colour, in the
    order of kinds), `label` (written beside it), `name` (shown by the pointer) and the field that shape names.
    """
    charts = []
    legend = alt.Legend(title=None, orient="bottom", columns=2, labelLimit=300)
    for rows, field, title in sides:
        points = alt.Chart(alt.Data(values=rows)).encode(
            x=alt.X(f"{field}:Q", title=title, scale=alt.Scale(zero=False, padding=45)),
            y=alt.Y(
                "perplexity:Q",
                scale=alt.Scale(type="log", nice=False, padding=14),
                axis=alt.Axis(values=[15, 20, 25, 30, 40, 50, 60, 70, 100, 200, 500, 1000, 2000]),
                title="perplexity (lower is better)",
            ),
            color=alt.Color("kind:N", sort=kinds, scale=alt.Scale(scheme="dark2"), legend=legend),
            tooltip=["name:N"],
        )
        dots = points.mark_point(filled=True, size=70, opacity=1).encode(shape=alt.Shape(f"{shape}:N", legend=legend))
        names = points.mark_text(align="left", dx=7, fontSize=13).encode(text="label:N")
        charts.append((dots + names).properties(width=520, height=320))
    return alt.vconcat(*charts).configure_axis(labelFontSize=13, titleFontSize=14).configure_legend(labelFontSize=14)
