"""The table and the picture of benchmarks/quality.py, from the figures of its cells."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair

COLUMNS = ("embedded", "embedded-lambada")
"""The texts that perplexity is measured on, in the order of the table's columns."""


def markdown(dense: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """One row per method and pattern; mean ± standard deviation over the seeds."""
    answers = ["KL along own answers"] if dense["answers"] else []
    names = ["pattern", "method", "Wikipedia", "novels", "loss left", "KL to dense", *answers]
    names += ["layer error", "seconds (of them training)", "peak GiB", "measured"]
    lines = [
        f"{dense['model']}, {dense['nsamples']} × {dense['seqlen']} calibration tokens, perplexity at sequence length "
        f"{dense['seqlen']} on {dense['eval_tokens']:,} tokens of each text. Loss left: (perplexity − dense) ÷ "
        "(SparseGPT's − dense), on Wikipedia / on novels.",
        "",
        f"| {' | '.join(names)} |",
        "| --- | --- |" + " ---: |" * (len(names) - 3) + " --- |",
    ]
    values = [f"{dense['perplexity'][text]:.2f}" for text in COLUMNS]
    zeros = ["0"] * (3 + len(answers))  # loss, divergences and errors
    lines.append(f"| – | dense | {' | '.join([*values, *zeros])} | – | – | {dense['measured']} |")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["pattern"], result["method"]), []).append(result)
    for (pattern, method), group in groups.items():
        lines.append(
            f"| {shown(pattern)} | {method} | {' | '.join(row(group, groups.get((pattern, 'sparsegpt'), []), dense))} |"
        )
    return "\n".join(lines)


def row(group: list[dict[str, Any]], sparsegpt: list[dict[str, Any]], dense: dict[str, Any]) -> list[str]:
    """The figures of one method at one pattern, over its seeds."""
    left = []
    for text in COLUMNS:
        base = {one["seed"]: one["perplexity"][text] - dense["perplexity"][text] for one in sparsegpt}
        losses = [(one["seed"], one["perplexity"][text] - dense["perplexity"][text]) for one in group]
        left.append(spread([100 * loss / base[seed] for seed, loss in losses if seed in base], ".0f"))
    return [
        *(spread([one["perplexity"][text] for one in group], ".2f") for text in COLUMNS),
        f"{left[0]} / {left[1]} %" if left[0] != "–" else "–",
        spread([one["kl"][0] for one in group], ".3f"),
        *([spread([one["own_kl"] for one in group if one["own_kl"] is not None], ".3f")] if dense["answers"] else []),
        spread([one["layer_error"] for one in group if one["layer_error"] is not None], ".4f"),
        f"{spread([one['seconds'] for one in group], '.0f')} ({statistics.fmean(one['training_seconds'] for one in group):.0f})",
        spread([one["memory"] / 2**30 for one in group if one["memory"] is not None], ".2f"),
        "; ".join(dict.fromkeys(one["measured"] for one in group)),
    ]


def shown(pattern: str) -> str:
    """A pattern for people: N:M, or a share of zeros."""
    return pattern if ":" in pattern else f"{100 * float(pattern):.0f} %"


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation; the value alone where there is one."""
    if not values:
        return "–"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def draw(dense: dict[str, Any], results: list[dict[str, Any]]) -> altair.HConcatChart:
    """Perplexity against seconds on both texts: a point for every seed; a rule where the dense model is."""
    import altair as alt  # not in a cell, whose peak memory is measured

    sides = []
    for text, title in zip(COLUMNS, ("Wikipedia", "novels"), strict=True):
        rows = [
            {"method": one["method"], "pattern": shown(one["pattern"]), "seconds": one["seconds"]}
            | {"perplexity": one["perplexity"][text]}
            for one in results
        ]
        axis = alt.Y("perplexity:Q", scale=alt.Scale(type="log", nice=False, padding=14), title=f"perplexity, {title}")
        points = alt.Chart(alt.Data(values=rows)).mark_point(filled=True, size=60, opacity=0.8)
        points = points.encode(
            x=alt.X(
                "seconds:Q",
                scale=alt.Scale(type="log", nice=False, padding=14),
                title="seconds of pruning and training",
            ),
            y=axis,
            color=alt.Color("method:N", title=None, sort=None, scale=alt.Scale(scheme="dark2")),
            shape=alt.Shape("pattern:N", title=None),
        )
        rule = alt.Chart(alt.Data(values=[{"perplexity": dense["perplexity"][text]}])).mark_rule(strokeDash=[4, 3])
        sides.append((points + rule.encode(y=axis)).properties(width=380, height=320))
    return alt.hconcat(*sides)
