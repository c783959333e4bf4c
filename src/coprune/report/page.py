"""`report.html` of one run: what was pruned, what that did, and how to do it again."""

from __future__ import annotations

from collections.abc import Sequence

from coprune.base.shown import per_cent
from coprune.report.accuracy import accuracy_card, accuracy_section
from coprune.report.answers_page import answers_section
from coprune.report.heat_map import heat_map, matrix_rows
from coprune.report.html import (
    card,
    copyable,
    header,
    listed,
    made_lines,
    page,
    quote,
    seconds,
    section,
    short,
    table,
    text,
)
from coprune.report.matrices import picker, picker_data
from coprune.report.perplexity import perplexity_card, perplexity_section
from coprune.report.schema import Report
from coprune.report.source import name_of
from coprune.report.vocabulary import vocabulary_section
from coprune.report.zero_shot import zero_shot_card, zero_shot_section

_SAME = 0.001  # sparsities that differ by less are one figure


def run_page(report: Report, speed: Sequence[str] = (), links: Sequence[str] = ()) -> str:
    """Build the page of one run. speed: sections about its speed, HTML; links: to pages that belong to it, HTML."""
    parts = [_head(report, links), _cards(report)]
    if report.perplexity:
        parts.append(perplexity_section(report))
    if report.vocabulary is not None:
        parts.append(vocabulary_section(report.vocabulary))
    if report.accuracy:
        parts.append(accuracy_section(report.accuracy))
    if report.zero_shot is not None:
        parts.append(zero_shot_section(report.zero_shot))
    if report.answers is not None:
        who = "pruned" if report.finetuned is None else "fine-tuned"
        parts.append(answers_section(report.answers, report.required, who))
    if report.sample is not None:
        parts.append(_sample(report))
    parts += [_matrices(report), picker(report.matrices, report.model.block_names)]
    parts += [*speed, _events(report), _phases(report), _recipe(report)]
    data = picker_data(report.matrices, report.model.block_names)
    return page(f"{name_of(report.model.source)}, pruned with {report.recipe.way}", "\n".join(parts), data)


def _head(report: Report, links: Sequence[str]) -> str:
    model, recipe = report.model, report.recipe
    data = report.calibration
    samples = "images" if model.task == "images" else "samples"
    calibration = (
        ""
        if data is None
        else f" Calibrated on {data.nsamples} {samples} of {data.source}, seed {data.seed}.{data.details()}"
    )
    lead = (
        f'<p class="soft">{text(model.source)}: {text(model.model_type)}, {model.blocks} blocks, '
        f"{model.parameters:,} parameters in {text(model.dtype)}. Pattern {text(recipe.shape)}, "
        f"{text(recipe.calibration.propagation)} propagation.{text(calibration)}</p>"
    )
    if report.low_rank is not None:
        lead += f'<p class="soft">Added: {text(report.low_rank.line())}.</p>'
    if report.finetuned is not None:
        lead += f'<p class="soft">Then fine-tuned: {text(report.finetuned.line())}.</p>'
    if model.quantised_source:
        lead += '<p class="warn">The weights were dequantised from a quantised file; all figures are of those.</p>'
    kind = "Pruning" if report.finetuned is None else "Pruning and fine-tuning"
    return header(
        kind, f"{name_of(report.model.source)}, pruned with {recipe.way}", lead, made_lines(report.made), links
    )


def _cards(report: Report) -> str:
    zeros = card(
        "zeros in the pruned matrices",
        per_cent(report.sparsity.matrices),
        f"{per_cent(report.sparsity.model)} of all parameters, {len(report.matrices)} matrices",
    )
    cards = [zeros] if report.has_zeros else []
    cards += [perplexity_card(report, entry) for entry in report.perplexity]
    cards += [accuracy_card(found) for found in report.accuracy]
    cards.append(zero_shot_card(report.zero_shot))
    parameters = report.model.parameters if report.left is None else report.left
    left = parameters - round(report.sparsity.model * parameters)
    stored = "; stored dense" if report.has_zeros else ""
    stored += f"; stored with {short(report.padding)} zeros of padding" if report.padding else ""
    cards.append(card("weights left", short(left), f"of {short(report.model.parameters)}{stored}"))
    cards.append(card("time", seconds(report.prune_seconds), f"to prune; {seconds(report.total_seconds)} in all"))
    cards.append(card("peak memory", f"{report.peak_memory_bytes / 2**30:.2f} GiB", f"on {report.model.device}"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _matrices(report: Report) -> str:
    """Sparsity, as a sentence where it is the same everywhere, and layer error."""
    rows = matrix_rows(report.matrices, report.model.block_names)
    shares = [row["sparsity"] for row in rows]
    parts = []
    if shares and max(shares) - min(shares) < _SAME:
        least, most = per_cent(min(shares)), per_cent(max(shares))
        said = f"Every pruned matrix is {least} zeros."
        parts.append(
            section("Sparsity", note=said if least == most else f"Pruned matrices are {least} to {most} zeros.")
        )
    elif shares:
        parts.append(section("Sparsity per block and kind of matrix", heat_map(rows, "sparsity")))
    if any(row["error"] is not None for row in rows):
        note = "‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration inputs of each matrix: how much of its output was lost."
        parts.append(section("Layer error", heat_map(rows, "error"), note=note))
    return "".join(parts)


def _sample(report: Report) -> str:
    sample = report.sample
    assert sample is not None
    sides = (("dense", sample.dense), ("pruned", sample.pruned))
    quotes = "".join(quote(which, which, said, sample.prompt) for which, said in sides if said is not None)
    return section(
        "A sample of text", f'<div class="two">{quotes}</div>', note="The likeliest continuation of one prompt."
    )


def _events(report: Report) -> str:
    trained = listed("Block reconstruction", report.reconstructions)
    if not report.troubles:
        none = section("Numerical events", note="None: no matrix needed more damping, a fallback or topping up.")
        return trained + none
    return trained + listed("Numerical events", report.troubles)


def _phases(report: Report) -> str:
    rows = [
        [
            phase.name,
            seconds(phase.seconds),
            "–" if phase.resident_bytes is None else f"{phase.resident_bytes / 2**30:.2f} GiB",
            *([] if phase.device_bytes is None else [f"{phase.device_bytes / 2**30:.2f} GiB"]),
        ]
        for phase in report.phases
    ]
    gpu = any(phase.device_bytes is not None for phase in report.phases)
    titles = ["phase", "time", "resident memory at its end", *(["GPU memory at its end"] if gpu else [])]
    return section("Time and memory", table(titles, rows)) if rows else ""


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
