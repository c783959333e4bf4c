"""`report.html` of one run: what was pruned, what that did, and how to do it again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from coprune.base.shown import per_cent
from coprune.evaluation.zero_shot import ZeroShotFacts
from coprune.report.accuracy import accuracy_card, accuracy_section
from coprune.report.answers_page import answers_section
from coprune.report.card import percent
from coprune.report.charts import bins_chart, heat_map, matrix_rows, zero_shot_bars
from coprune.report.html import card, chart, copyable, page, section, table, text
from coprune.report.perplexity import perplexity_card, perplexity_section
from coprune.report.schema import Report

_DISTRIBUTIONS = {
    "magnitude": "log₁₀ |weight|",
    "norm": "log₁₀ input norm (RMS per channel)",
    "score": "log₁₀ |weight| · input norm",
}

_SAME = 0.001  # sparsities that differ by less are one figure


def run_page(report: Report, speed: Sequence[str] = ()) -> str:
    """Build the page of one run. speed: sections about its speed, HTML."""
    rows = matrix_rows(report.matrices, report.model.block_names)
    charts: dict[str, Any] = {}
    parts = [_head(report), _cards(report)]
    if report.perplexity:
        parts.append(perplexity_section(report))
    if report.accuracy:
        parts.append(accuracy_section(report.accuracy))
    if report.zero_shot is not None:
        charts["zero-shot"] = zero_shot_bars(report.zero_shot)
        parts.append(_zero_shot(report.zero_shot))
    shares = [row["sparsity"] for row in rows]
    if shares and max(shares) - min(shares) < _SAME:
        parts.append(section("Sparsity", note=f"Every pruned matrix is {per_cent(max(shares))} zeros."))
    else:
        charts["sparsity"] = heat_map(rows, "sparsity", "zeros", 1.0)
        parts.append(section("Sparsity per block and kind of matrix", chart("sparsity")))
    if any(row["error"] is not None for row in rows):
        charts["layer-error"] = heat_map(rows, "error", "relative layer error", None)
        note = "‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration inputs of each matrix: how much of its output was lost."
        parts.append(section("Layer error", chart("layer-error"), note=note))
    parts.append(_picker(report))
    if report.answers is not None:
        parts.append(answers_section(report.answers, report.required, tuned=report.finetuned is not None))
    if report.sample is not None:
        parts.append(_sample(report))
    parts += [*speed, _events(report), _phases(report), _recipe(report)]
    data = {
        "charts": charts,
        "matrices": [_matrix(matrix) for matrix in report.matrices],
        "distributions": {kind: bins_chart(title, split=kind != "norm") for kind, title in _DISTRIBUTIONS.items()},
    }
    return page(f"{_name(report)}, pruned with {report.recipe.way}", "\n".join(parts), data)


def _name(report: Report) -> str:
    return report.model.source.partition(" ")[0].rstrip("/").rpartition("/")[2]


def _head(report: Report) -> str:
    model, recipe = report.model, report.recipe
    data = report.calibration
    samples = "images" if model.task == "images" else "samples"
    calibration = (
        ""
        if data is None
        else f" Calibrated on {data.nsamples} {samples} of {data.source}, seed {data.seed}.{data.details()}"
    )
    lines = (
        f"<h1>{text(_name(report))}, pruned with {text(recipe.way)}</h1>"
        f'<p class="soft">{text(model.source)}: {text(model.model_type)}, {model.blocks} blocks, '
        f"{model.parameters:,} parameters in {text(model.dtype)}. Pattern {text(recipe.shape)}, "
        f"{text(recipe.calibration.propagation)} propagation.{text(calibration)}</p>"
    )
    if model.quantised_source:
        lines += '<p class="warn">The weights were dequantised from a quantised file; all figures are of those.</p>'
    if report.made is not None:
        typed = "" if report.made.command is None else f": <code>{text(report.made.command)}</code>"
        lines += f'<p class="soft">{text(report.made.line())}{typed}</p>'
    return f"<header>{lines}</header>"


def _cards(report: Report) -> str:
    zeros = card(
        "zeros in the pruned matrices",
        per_cent(report.sparsity.matrices),
        f"{per_cent(report.sparsity.model)} of all parameters, {len(report.matrices)} matrices",
    )
    cards = [zeros] if report.has_zeros else []
    cards += [perplexity_card(report, entry) for entry in report.perplexity[:1]]
    cards += [accuracy_card(found) for found in report.accuracy[:1]]
    facts = report.zero_shot
    if facts is not None and facts.mean_pruned is not None:
        before = "" if facts.mean_dense is None else f'<span class="from">{100 * facts.mean_dense.value:.2f} →</span> '
        cards.append(
            card("mean accuracy", f"{before}{per_cent(facts.mean_pruned.value)}", f"over {len(facts.tasks)} tasks")
        )
    parameters = report.model.parameters if report.left is None else report.left
    left = parameters - round(report.sparsity.model * parameters)
    stored = "; stored dense" if report.has_zeros else ""
    stored += f"; stored with {_short(report.padding)} zeros of padding" if report.padding else ""
    cards.append(card("weights left", _short(left), f"of {_short(report.model.parameters)}{stored}"))
    cards.append(card("time", _seconds(report.prune_seconds), f"to prune; {_seconds(report.total_seconds)} in all"))
    cards.append(card("peak memory", f"{report.peak_memory_bytes / 2**30:.2f} GiB", f"on {report.model.device}"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _zero_shot(facts: ZeroShotFacts) -> str:
    rows = []
    for task in facts.tasks:
        for metric, pruned in task.pruned.items():
            dense = None if task.dense is None else task.dense.get(metric)
            delta = None if task.delta is None else task.delta.get(metric)
            rows.append(
                [
                    task.task,
                    metric,
                    percent(dense),
                    percent(pruned),
                    percent(delta, "+"),
                    str(task.items),
                    str(task.version),
                ]
            )
    if facts.mean_pruned is not None:
        mean = [percent(facts.mean_dense), percent(facts.mean_pruned), percent(facts.mean_delta, "+")]
        rows.append(["mean", "acc", *mean, "", ""])
    shots = {task.num_fewshot for task in facts.tasks}
    note = (
        f"lm-eval {facts.harness}, {', '.join(map(str, sorted(shots)))} examples before each question. Bars show 95 % "
        "intervals; the difference has the standard error over the same items."
    )
    header = ["task", "metric", "dense %", "pruned %", "difference", "items", "version"]
    return section("Zero-shot tasks", chart("zero-shot"), table(header, rows), note=note)


def _picker(report: Report) -> str:
    charts = "".join(f'<div><div class="chart" id="distribution-{kind}"></div></div>' for kind in _DISTRIBUTIONS)
    body = (
        '<div class="panel"><div class="picker"><select id="matrix" aria-label="matrix"></select>'
        '<button type="button" id="previous" aria-label="previous matrix">←</button>'
        '<button type="button" id="next" aria-label="next matrix">→</button></div>'
        f'<p class="facts" id="matrix-facts"></p><div class="three">{charts}</div></div>'
    )
    return section(
        "One matrix", body, note="Before pruning, on a sample of its rows; input norms are over the calibration data."
    )


def _sample(report: Report) -> str:
    sample = report.sample
    assert sample is not None

    def quote(which: str, continuation: str | None) -> str:
        if continuation is None:
            return ""
        return (
            f'<div class="panel"><div class="tag {which}">{which}</div><blockquote><span class="prompt">'
            f"{text(sample.prompt)}</span> {text(continuation)}</blockquote></div>"
        )

    body = f'<div class="two">{quote("dense", sample.dense)}{quote("pruned", sample.pruned)}</div>'
    return section("A sample of text", body, note="The likeliest continuation of one prompt.")


def _events(report: Report) -> str:
    trained = _listed("Block reconstruction", report.reconstructions)
    if not report.troubles:
        none = section("Numerical events", note="None: no matrix needed more damping, a fallback or topping up.")
        return trained + none
    return trained + _listed("Numerical events", report.troubles)


def _listed(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return section(f"{title} ({len(lines)})", f'<div class="panel"><ul class="events">{items}</ul></div>')


def _phases(report: Report) -> str:
    rows = [
        [
            phase.name,
            _seconds(phase.seconds),
            "–" if phase.resident_bytes is None else f"{phase.resident_bytes / 2**30:.2f} GiB",
            *([] if phase.device_bytes is None else [f"{phase.device_bytes / 2**30:.2f} GiB"]),
        ]
        for phase in report.phases
    ]
    gpu = any(phase.device_bytes is not None for phase in report.phases)
    header = ["phase", "time", "resident memory at its end", *(["GPU memory at its end"] if gpu else [])]
    return section("Time and memory", table(header, rows)) if rows else ""


def _recipe(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    note = (
        "A part of it was handed over in Python, so it does not repeat the run by itself."
        if report.recipe.given
        else "Save it as recipe.yaml; coprune prune --recipe recipe.yaml repeats the run."
    )
    return section("Recipe", copyable("recipe", report.recipe.untold().to_yaml()), note=note) + section(
        "Versions", note=versions
    )


def _matrix(matrix: Any) -> dict[str, Any]:
    error = matrix.relative_layer_error
    return {
        "name": matrix.name,
        "shape": matrix.shape,
        "sparsity": matrix.sparsity,
        "error": error if error is None or math.isfinite(error) else None,
        "tokens": matrix.tokens,
        "events": list(matrix.events),
        "distributions": None if matrix.distributions is None else matrix.distributions.model_dump(mode="json"),
    }


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g} {letter}"
    return str(count)
