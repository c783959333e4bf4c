"""The charts of a report as Vega-Lite specifications, made with Altair; the page draws them in the reader's colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from coprune.evaluation.zero_shot import MAIN_METRIC, ZeroShotFacts
from coprune.pruning.pruner import MatrixResult

Spec = dict[str, Any]

DENSE, PRUNED = "#4c78a8", "#e4793c"
_SCHEME = "viridis"
_NAMED = 8  # more points than these bear their names only on the front


def place_of(name: str, blocks: Sequence[str] = ()) -> tuple[str, str]:
    """Split a matrix's name into its block's number ('–' outside of the blocks) and its kind, experts together.

    `model.layers.3.self_attn.q_proj` → ('3', 'self_attn.q_proj'); `…mlp.experts.up_proj[2]` → '….up_proj[*]'; with the blocks'
    names `stages.1.blocks.2.mlp.fc1` → ('1.2', 'mlp.fc1'). Without them a block's number is the first in the name.
    """
    path, bracket, _ = name.partition("[")
    parts = path.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    depth = max((block.count(".") + 1 for block in blocks if f"{path}.".startswith(f"{block}.")), default=0)
    within = [index for index in numbers if index < depth] or ([] if blocks else numbers[:1])
    kind = parts[within[-1] + 1 :] if within else parts
    shown = ".".join("*" if part.isdigit() else part for part in kind) + ("[*]" if bracket else "")
    return ".".join(parts[index] for index in within) or "–", shown


def matrix_rows(matrices: Sequence[MatrixResult], blocks: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row per block and kind: experts of a layer are averaged by their size. blocks: their names."""
    groups: dict[tuple[str, str], list[MatrixResult]] = {}
    for matrix in matrices:
        groups.setdefault(place_of(matrix.name, blocks), []).append(matrix)
    rows = []
    for (block, kind), group in groups.items():
        size = sum(matrix.shape[0] * matrix.shape[1] for matrix in group)
        zeros = sum(matrix.sparsity * matrix.shape[0] * matrix.shape[1] for matrix in group)
        errors = [matrix.relative_layer_error for matrix in group if matrix.relative_layer_error is not None]
        rows.append(
            {
                "block": block,
                "kind": kind,
                "matrix": group[0].name if len(group) == 1 else f"{len(group)} matrices",
                "sparsity": zeros / size,
                "error": sum(errors) / len(errors) if errors else None,
            }
        )
    return rows


def heat_map(rows: list[dict[str, Any]], field: str, title: str, top: float | None) -> Spec:
    """Colour per block and kind. field: `sparsity` or `error`; top: the end of the scale (default: the largest)."""
    known = [row for row in rows if row[field] is not None]
    largest = max((row[field] for row in known), default=1.0)
    chart = (
        alt.Chart(alt.Data(values=known))
        .mark_rect()
        .encode(
            x=alt.X("block:O", title="block", sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("kind:N", title=None, sort=None, axis=alt.Axis(labelLimit=160)),
            color=alt.Color(
                f"{field}:Q",
                title=title,
                scale=alt.Scale(scheme=_SCHEME, domain=[0, top or largest or 1.0]),
                legend=alt.Legend(orient="top", format="~%", gradientLength=220, titleLimit=300),
            ),
            tooltip=[
                alt.Tooltip("matrix:N"),
                alt.Tooltip("sparsity:Q", format=".2%"),
                alt.Tooltip("error:Q", title="layer error", format=".3%"),
            ],
        )
        .properties(width="container", height=20 * len({row["kind"] for row in known}))
    )
    return _spec(chart)


def zero_shot_bars(facts: ZeroShotFacts) -> Spec:
    """Accuracy of every task for both models, with 95 % intervals."""
    rows = []
    for task in facts.tasks:
        for model, metrics in (("dense", task.dense), ("pruned", task.pruned)):
            if metrics is None:
                continue
            metric = MAIN_METRIC if MAIN_METRIC in metrics else next(iter(metrics))
            found = metrics[metric]
            reach = 1.96 * (found.stderr or 0.0)
            rows.append(
                {
                    "task": task.task,
                    "model": model,
                    "metric": metric,
                    "value": found.value,
                    "low": found.value - reach,
                    "high": found.value + reach,
                }
            )
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("task:N", title=None, sort=None, axis=alt.Axis(labelLimit=140)),
        yOffset=alt.YOffset("model:N", sort=None),
    )
    bars = base.mark_bar(cornerRadiusEnd=2).encode(
        x=alt.X("value:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(zero=True)),
        color=_models_colour(),
        tooltip=["task:N", "model:N", "metric:N", alt.Tooltip("value:Q", format=".2%")],
    )
    reach = base.mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q")
    return _spec((bars + reach).properties(width="container", height=32 * len(facts.tasks)))


def bins_chart(title: str, split: bool = True) -> Spec:
    """Bars over log₁₀, for bins that the page fills in as the data called `bins`.

    split: whether there are pruned ones among the values, so that a legend is wanted.
    """
    chart = (
        alt.Chart(alt.NamedData("bins"))
        .mark_bar(binSpacing=0.5)
        .encode(
            x=alt.X("start:Q", bin=alt.BinParams(binned=True), title=title, axis=alt.Axis(tickCount=6)),
            x2="end:Q",
            y=alt.Y("count:Q", title=None, stack="zero", axis=alt.Axis(tickCount=4, format="~s")),
            color=alt.Color(
                "what:N",
                title=None,
                scale=alt.Scale(domain=["kept", "pruned"], range=[DENSE, PRUNED]),
                legend=alt.Legend(orient="top") if split else None,
            ),
            order=alt.Order("what:N", sort="descending"),
            tooltip=["what:N", "count:Q", alt.Tooltip("start:Q", format=".2f"), alt.Tooltip("end:Q", format=".2f")],
        )
        .properties(width="container", height=150)
    )
    return _spec(chart)


def pareto(rows: list[dict[str, Any]], x: str, x_title: str, x_format: str) -> Spec:
    """Perplexity against sparsity or size, one point per run; the line joins runs that no other beats in both.

    rows: `name`, `method`, `perplexity`, `front` (bool) and the field x.
    """
    # Padding would go below zero, where no sparsity is.
    from_zero = any(row[x] == 0 for row in rows)
    scale = alt.Scale(domain=[0, 1.1 * max(row[x] for row in rows)]) if from_zero else alt.Scale(zero=False, padding=20)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(f"{x}:Q", title=x_title, axis=alt.Axis(format=x_format), scale=scale),
        y=alt.Y("perplexity:Q", title="perplexity", scale=alt.Scale(type="log", nice=False, padding=20)),
    )
    front = base.transform_filter("datum.front").mark_line(strokeDash=[4, 3], strokeWidth=1.5, color="#888888")
    points = base.mark_point(filled=True, size=90, opacity=0.95).encode(
        color=alt.Color("method:N", title=None, legend=alt.Legend(orient="top")),
        shape=alt.Shape("method:N", title=None),
        tooltip=[
            "name:N",
            "method:N",
            alt.Tooltip("perplexity:Q", format=".2f"),
            alt.Tooltip(f"{x}:Q", format=x_format),
        ],
    )
    # Names of many runs would cover each other; the others have theirs where the pointer is.
    named = base.transform_filter("datum.front") if len(rows) > _NAMED else base
    names = named.mark_text(align="left", dx=8, dy=-6, fontSize=10, limit=140).encode(text="name:N")
    return _spec((front + points + names).properties(width="container", height=320))


def _models_colour() -> alt.Color:
    return alt.Color(
        "model:N",
        title=None,
        sort=None,
        scale=alt.Scale(domain=["dense", "pruned"], range=[DENSE, PRUNED]),
        legend=alt.Legend(orient="top"),
    )


def _spec(chart: Any) -> Spec:
    spec: Spec = chart.to_dict(validate=True)
    spec.pop("config", None)  # the page sets colours and sizes by the reader's theme
    return spec
