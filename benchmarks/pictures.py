"""Draw the pictures of the documentation from the figures in `benchmarks/results/`: perplexity against bytes and against speed.

python benchmarks/pictures.py
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

ROOT = Path(__file__).parents[1]
SPEED = "tokens per second, decoding one sequence"


def main() -> None:
    """Draw all pictures."""
    sizes().save(ROOT / "docs" / "sizes.svg")
    frontier().save(ROOT / "docs" / "frontier.svg")
    vocabulary().save(ROOT / "docs" / "vocabulary.svg")


def sizes() -> alt.VConcatChart:
    """Draw perplexity, size and speed of models with removed parts, in two runtimes."""
    kinds = {
        "dense": "dense",
        "channels": "channels removed",
        "uneven": "channels removed, uneven",
        "blocks": "blocks removed",
    }
    rows = []
    for row in figures("sizes"):
        runtime, stored = row["runtime"].split()
        in_llama = runtime == "llama.cpp"
        kind = next((kind for kind in reversed(kinds) if kind in row["model"]), "dense")
        rows.append(
            {"name": f"{row['model']}, {row['runtime']}", "kind": kinds[kind], "runtime": runtime}
            | {"label": " ".join([*how_much(row["model"]), *([stored] if in_llama else [])]), "stored": stored}
            | {"MB": row["MB"], "perplexity": row["perplexity"]}
            | {"decode": row["decoding tokens/s"].split()[0]}
        )
    # On the disk a file of f16 is what a folder of bfloat16 is.
    files = [row for row in rows if row["stored"] != "bfloat16"]
    return beside([(files, "MB", "MB on the disk"), (rows, "decode", SPEED)], "runtime", [*kinds.values()])


def how_much(model: str) -> list[str]:
    """Return the share of weights, channels or blocks that a model lost."""
    if " → " in model:
        before, after = map(int, re.findall(r"\d+", model))
        return [f"{100 * (1 - after / before):.0f} %"]
    return re.findall(r"\d+ ?%|\d+:\d+|\d+ of \d+", model)


def frontier() -> alt.VConcatChart:
    """Draw models by bytes and by speed, without those rows with zeros whose labels would overlap."""
    rows = []
    for row in figures("frontier-smollm2"):
        *done, stored = row["row"].split()
        kind = " ".join(word for word in done if not word[0].isdigit())
        zeros = [word for word in done if word[0].isdigit()]
        if kind == "balanced by blocks" or zeros in (["70%"], ["80%"]):
            continue
        label = " ".join(zeros or [stored])
        named = {"name": row["row"], "kind": kind, "label": label, "stored": stored}
        rows.append(row | named | {"perplexity": row["Wikipedia"]})
    run = [row for row in rows if row["decode"] not in ("", "–")]
    return beside([(rows, "MB", "MB"), (run, "decode", SPEED)], "stored", [*dict.fromkeys(row["kind"] for row in rows)])


def vocabulary() -> alt.LayerChart:
    """Draw smaller vocabularies beside llama.cpp's own quants, on Gemma-3-270M."""
    rows = [
        {"name": row["file"], "MB": row["MB"], "bits": row["Wikipedia"].split()[0]}
        | {"label": row["file"].removeprefix("whole ").replace("vocabulary=", "").replace("embedding ", "")}
        | {"kind": "whole vocabulary" if row["file"].startswith("whole") else "fewer tokens"}
        for row in figures("vocabulary")
    ]
    points = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("MB:Q", title="MB on the disk", scale=alt.Scale(zero=False, padding=60)),
        y=alt.Y(
            "bits:Q", title="bits per byte of Wikipedia (lower is better)", scale=alt.Scale(zero=False, padding=20)
        ),
        color=alt.Color(
            "kind:N",
            sort=["whole vocabulary", "fewer tokens"],
            scale=alt.Scale(scheme="dark2"),
            legend=alt.Legend(title=None, orient="bottom", labelLimit=300),
        ),
        tooltip=["name:N"],
    )
    names = points.mark_text(align="left", dx=8, fontSize=13).encode(text="label:N")
    chart = (points.mark_point(filled=True, size=80, opacity=1) + names).properties(width=620, height=330)
    return chart.configure_axis(labelFontSize=13, titleFontSize=14).configure_legend(labelFontSize=14)


def figures(name: str) -> list[dict[str, Any]]:
    """Return the rows of a file of results."""
    return list(
        csv.DictReader((ROOT / "benchmarks" / "results" / f"{name}.csv").read_text(encoding="utf-8").splitlines())
    )


def beside(sides: Sequence[tuple[list[dict[str, Any]], str, str]], shape: str, kinds: list[str]) -> alt.VConcatChart:
    """Perplexity of rows against two of their fields, one chart below the other so that a phone shows them legibly.

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
                axis=alt.Axis(values=[15, 20, 25, 30, 40, 50, 70, 100, 200, 500]),
                title="perplexity (lower is better)",
            ),
            color=alt.Color("kind:N", sort=kinds, scale=alt.Scale(scheme="dark2"), legend=legend),
            tooltip=["name:N"],
        )
        dots = points.mark_point(filled=True, size=70, opacity=1).encode(shape=alt.Shape(f"{shape}:N", legend=legend))
        names = points.mark_text(align="left", dx=7, fontSize=13).encode(text="label:N")
        charts.append((dots + names).properties(width=520, height=320))
    return alt.vconcat(*charts).configure_axis(labelFontSize=13, titleFontSize=14).configure_legend(labelFontSize=14)


if __name__ == "__main__":
    main()
