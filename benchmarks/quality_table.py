"""The table and the picture of benchmarks/quality.py, made from its cells."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair

COLUMNS = ("embedded", "embedded-lambada")
"""The texts that perplexity is measured on, in the order of the table's columns."""
_WHERE = ("date", "commit", "machine")


def facts(dense: dict[str, Any]) -> str:
    """Return a sentence with the settings that all rows share."""
    tasks = (
        f" Zero-shot accuracy in per cent, the first {dense['tasks']} items of each task." if "tasks" in dense else ""
    )
    return (
        f"{dense['model']}, {dense['nsamples']} × {dense['seqlen']} calibration tokens, perplexity at sequence length "
        f"{dense['seqlen']} on {dense['eval_tokens']:,} tokens of each text. Loss left: (perplexity − dense) ÷ "
        f"(SparseGPT's − dense), on Wikipedia / on novels.{tasks}"
    )


def rows_of(dense: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row per method and pattern; mean ± standard deviation over the seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["pattern"], result["method"]), []).append(result)
    rows = [{"pattern": "–", "method": "dense"} | row([dense], [], dense)]
    for (pattern, method), group in groups.items():
        cells = row(group, groups.get((pattern, "sparsegpt"), []), dense)
        rows.append({"pattern": shown(pattern), "method": method} | cells)
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """Return rows as a table."""
    lines = [list(rows[0]), ["---", "---", *["---:"] * (len(rows[0]) - 2)], *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(file: Path, rows: list[dict[str, str]]) -> None:
    """Write rows to a file, as benchmarks/tables.py reads it."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def row(group: list[dict[str, Any]], sparsegpt: list[dict[str, Any]], dense: dict[str, Any]) -> dict[str, str]:
    """The figures of one method at one pattern, over its seeds."""
    left = []
    for text in COLUMNS:
        base = {one["seed"]: one["perplexity"][text] - dense["perplexity"][text] for one in sparsegpt}
        losses = [(one["seed"], one["perplexity"][text] - dense["perplexity"][text]) for one in group]
        left.append(spread([100 * loss / base[seed] for seed, loss in losses if seed in base], ".0f"))
    cells = {
        title: spread([one["perplexity"][text] for one in group], ".2f")
        for text, title in zip(COLUMNS, ("Wikipedia", "novels"), strict=True)
    }
    if "tasks" in dense:
        cells |= accuracies(group)
    cells |= {
        "loss left": f"{left[0]} / {left[1]} %" if left[0] != "–" else "–",
        "KL to dense": spread([one["kl"][0] for one in group], ".3f"),
    }
    if dense["answers"]:
        cells["KL along own answers"] = spread([one["own_kl"] for one in group if one["own_kl"] is not None], ".3f")
    pruned = [one for one in group if "seconds" in one]
    seconds = spread([one["seconds"] for one in pruned], ".0f")
    training = f" ({statistics.fmean(one['training_seconds'] for one in pruned):.0f})" if pruned else ""
    measured = [one["measured"].split(", ", 2) for one in group]
    return cells | {
        "layer error": spread([one["layer_error"] for one in pruned if one["layer_error"] is not None], ".4f"),
        "seconds (of them training)": seconds + training,
        "peak GiB": spread([one["memory"] / 2**30 for one in pruned if one["memory"] is not None], ".2f"),
        **{
            name: "; ".join(dict.fromkeys(values))
            for name, values in zip(_WHERE, zip(*measured, strict=True), strict=True)
        },
    }


def accuracies(group: list[dict[str, Any]]) -> dict[str, str]:
    """Zero-shot accuracies in per cent, means over the seeds: the mean of the tasks with its standard error and each task."""
    tasks = {
        name: (
            statistics.fmean(100 * one["accuracy"][name][0] for one in group),
            statistics.fmean(100 * one["accuracy"][name][1] for one in group),
        )
        for name in group[0]["accuracy"]
    }
    if len(tasks) == 1:
        ((name, (value, error)),) = tasks.items()
        return {name: f"{value:.0f} ± {error:.1f}"}
    mean = statistics.fmean(value for value, _ in tasks.values())
    error = math.hypot(*(error for _, error in tasks.values())) / len(tasks)
    return {"mean of tasks": f"{mean:.1f} ± {error:.1f}"} | {name: f"{value:.0f}" for name, (value, _) in tasks.items()}


def shown(pattern: str) -> str:
    """A pattern as printed: N:M, or a share of zeros."""
    return pattern if ":" in pattern else f"{100 * float(pattern):.0f} %"


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation; the value alone where there is one."""
    if not values:
        return "–"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def draw(dense: dict[str, Any], results: list[dict[str, Any]]) -> altair.HConcatChart:
    """Draw perplexity against seconds on both texts: a point for every seed, and a line for the dense model."""
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
