"""`report.html` of one run: what was pruned, what that did, and how to do it again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coprune.base.words import per_cent
from coprune.evaluation.embeddings import EmbeddingChange
from coprune.evaluation.zero_shot import Estimate, TaskComparison, ZeroShotFacts, is_share, main_of
from coprune.pruning.distributions import Distributions, Histogram
from coprune.pruning.pruner import MatrixResult
from coprune.report.answers import answers_section
from coprune.report.figures import AccuracyFacts, ChangedPrediction, PerplexityFacts
from coprune.report.heat_map import heat_map, matrix_rows, place_of
from coprune.report.html import (
    Bar,
    bars,
    card,
    copyable,
    from_to,
    header,
    listed,
    made_lines,
    name_of,
    page,
    panel,
    quote,
    seconds,
    section,
    short,
    table,
    text,
)
from coprune.report.run_events import event_line
from coprune.report.schema import Report, training_line
from coprune.report.vocabulary import vocabulary_section

_SAME = 0.001  # sparsities that differ by less are one figure


def run_page(report: Report, links: Sequence[str] = ()) -> str:
    """Build the page of one run. links: to pages that belong to it, HTML."""
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
    parts += [_events(report), _phases(report), _recipe(report)]
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
        f"{text(recipe.calibrate.propagation)} propagation.{text(calibration)}</p>"
    )
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
    cards += [embedding_card(found) for found in report.embeddings]
    cards += [card(f"transcripts of {one.data}", one.headline(), one.line("dense")) for one in report.transcripts]
    cards.append(zero_shot_card(report.zero_shot))
    parameters = report.model.parameters if report.left is None else report.left
    left = parameters - round(report.sparsity.model * parameters)
    stored = "; stored dense" if report.has_zeros else ""
    stored += f"; stored with {short(report.padding)} zeros of padding" if report.padding else ""
    cards.append(card("weights left", short(left), f"of {short(report.model.parameters)}{stored}"))
    total = f"to prune; {seconds(report.total_seconds)} in all{report.before()}"
    cards.append(card("time", seconds(report.prune_seconds), total))
    cards.append(card("peak memory", f"{report.peak_memory_bytes / 2**30:.2f} GiB", f"on {report.model.device}"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _matrices(report: Report) -> str:
    """Return sparsity, as a sentence where it is uniform, and layer error."""
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
    trained = listed("Block reconstruction", [f"{one.block}: {training_line(one)}" for one in report.trainings])
    if not report.events:
        none = section("Numerical events", note="None: no matrix needed more damping, a fallback or topping up.")
        return trained + none
    return trained + listed("Numerical events", [event.line() for event in report.events])


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


def accuracy_card(found: AccuracyFacts) -> str:
    """Return the headline figure."""
    before = [] if found.dense_top1 is None else [f"{100 * found.dense_top1:.2f}"]
    shown = from_to([*before, per_cent(found.pruned_top1)])
    return card(f"top-1 accuracy on {found.data}", shown, f"of {found.images:,} {found.unit}")


def embedding_card(found: EmbeddingChange) -> str:
    """Return the headline figure of an embedding model."""
    overlap = f"{per_cent(found.overlap)} of the {found.nearest} nearest of {found.passages:,} passages alike"
    return card(f"cosine with the dense model on {found.data}", f"{found.cosine:.4f}", overlap)


def accuracy_section(found: list[AccuracyFacts]) -> str:
    """Return bars and a table of all sets of images, with the images whose predicted class changed."""
    header = [
        found[0].unit,
        "number",
        "dense top-1 %",
        "pruned top-1 %",
        "dense top-5 %",
        "pruned top-5 %",
        "changed class",
    ]
    rows = [
        [
            entry.data,
            f"{entry.images:,}",
            _share(entry.dense_top1, entry.dense_top1_interval),
            _share(entry.pruned_top1, entry.pruned_top1_interval),
            _share(entry.dense_top5, None),
            _share(entry.pruned_top5, entry.pruned_top5_interval),
            "–" if entry.changed is None else f"{entry.changed:,}",
        ]
        for entry in found
    ]
    shown = "".join(_examples(entry) for entry in found)
    charted = bars([(f"{entry.data}, top-1", _bars(entry)) for entry in found], top=1.0)
    return section("Accuracy", charted, table(header, rows), note="Intervals are Wilson's 95 %.") + shown


def _bars(entry: AccuracyFacts) -> list[Bar]:
    sides = (
        ("dense", entry.dense_top1, entry.dense_top1_interval),
        ("pruned", entry.pruned_top1, entry.pruned_top1_interval),
    )
    return [Bar(kind, kind, top1, per_cent(top1), reach) for kind, top1, reach in sides if top1 is not None]


def _share(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" + ("" if interval is None else f" [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]")


def _examples(found: AccuracyFacts) -> str:
    figures = "".join(_figure(example) for example in found.examples if example.thumbnail is not None)
    if not figures:
        return ""
    return section(
        f"Images of {found.data} whose predicted class changed",
        f'<div class="panel"><div class="images">{figures}</div></div>',
        note=f"The first of {found.changed:,}, with the right class and what both models see.",
    )


def _figure(example: ChangedPrediction) -> str:
    label, dense, pruned = example.names or (example.label, example.dense, example.pruned)
    source = text(example.thumbnail)
    tiny = ' class="tiny"' if "image/png" in source else ""
    return (
        f'<figure><img src="{source}" alt="image {example.image}"{tiny}><figcaption><b>{text(label)}</b>'
        f'<span class="tag dense">dense: {text(dense)}</span><span class="tag pruned">pruned: {text(pruned)}</span>'
        "</figcaption></figure>"
    )


_KINDS = {
    "magnitude": "log₁₀ |weight|",
    "norm": "log₁₀ input norm (RMS per channel)",
    "score": "log₁₀ |weight| · input norm",
}
_MOST = 600  # matrices whose histograms a page holds, at about 300 bytes each
# A bin is one character: its height in steps of less than a pixel.
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%()*+,-./:;=?@[]^_`{|}~"


def picker(matrices: Sequence[MatrixResult], blocks: Sequence[str]) -> str:
    """Return the section with the list of matrices and its charts; without distributions only the figures."""
    if not matrices:
        return ""
    charts = "".join(
        f'<div class="histogram" id="distribution-{kind}" data-title="{title}"></div>' for kind, title in _KINDS.items()
    )
    body = panel(
        '<div class="picker"><select id="matrix" aria-label="matrix"></select>'
        '<button type="button" id="previous" aria-label="previous matrix">←</button>'
        '<button type="button" id="next" aria-label="next matrix">→</button></div>'
        f'<p class="facts" id="matrix-facts"></p><div class="three">{charts}</div>'
    )
    note = "Before pruning, on a sample of its rows; input norms are over the calibration data."
    chosen = len(shown_matrices(matrices, blocks))
    if chosen < len(matrices):
        note += (
            f" {chosen:,} of the {len(matrices):,} matrices are here, of a block's experts the one that lost most; "
            "distributions.json holds all, and coprune inspect MODEL --plot NAME draws any."
        )
    return section("One matrix", body, note=note)


def picker_data(matrices: Sequence[MatrixResult], blocks: Sequence[str]) -> dict[str, Any]:
    """Return the data of the page's script: a short list per matrix, and the digits of its bins."""
    return {"digits": _DIGITS, "matrices": [_matrix(matrix) for matrix in shown_matrices(matrices, blocks)]}


def shown_matrices(matrices: Sequence[MatrixResult], blocks: Sequence[str]) -> list[MatrixResult]:
    """Return as many matrices as a page holds: all, or the worst expert per block, or those of some blocks."""
    if len(matrices) <= _MOST:
        return list(matrices)
    worst: dict[tuple[str, str], MatrixResult] = {}
    for matrix in matrices:
        place = place_of(matrix.name, blocks)
        if place not in worst or (matrix.relative_layer_error or 0) > (worst[place].relative_layer_error or 0):
            worst[place] = matrix
    numbers = list(dict.fromkeys(block for block, _ in worst))
    every = -(-len(worst) // _MOST)
    kept = set(numbers[::every])
    return [matrix for (block, _), matrix in worst.items() if block in kept][:_MOST]


def _matrix(matrix: MatrixResult) -> list[Any]:
    error, shape = matrix.relative_layer_error, matrix.shape
    error = None if error is None or not math.isfinite(error) else round(error, 6)
    figures = [matrix.name, f"{shape[0]} × {shape[1]}", round(matrix.sparsity, 6), error, matrix.tokens]
    return [*figures, " · ".join(map(event_line, matrix.events)), _charts(matrix.distributions)]


def _charts(found: Distributions | None) -> dict[str, Any]:
    histograms = {} if found is None else {kind: getattr(found, kind) for kind in _KINDS}
    return {kind: _packed(histogram) for kind, histogram in histograms.items() if histogram is not None}


def _packed(histogram: Histogram) -> list[Any]:
    """Return the ends, the largest count, and the bins of kept and pruned values as digits."""
    pruned = histogram.pruned or (0,) * len(histogram.kept)
    top = max(1, *(a + b for a, b in zip(histogram.kept, pruned, strict=True)))
    # Rounded up, so that every nonempty bin is visible.
    bins = ["".join(_DIGITS[math.ceil(n / top * (len(_DIGITS) - 1))] for n in row) for row in (histogram.kept, pruned)]
    return [round(histogram.low, 3), round(histogram.high, 3), top, bins[0], bins[1] if any(pruned) else ""]


def perplexity_card(report: Report, entry: PerplexityFacts) -> str:
    """Return the figures of one text, the run's result last."""
    tuned = {} if report.finetuned is None else report.finetuned.perplexity
    figures = [*([] if entry.dense is None else [entry.dense]), entry.pruned]
    figures += [tuned[entry.data]] if entry.data in tuned else []
    shown = from_to([number(figure) for figure in figures])
    return card(f"{entry.title} on {entry.data}", shown, f"sequence length {entry.seqlen}")


def perplexity_section(report: Report) -> str:
    """Return bars and a table of all texts."""
    tuned = None if report.finetuned is None else report.finetuned.perplexity
    rows = [_row(entry, tuned) for entry in report.perplexity]
    header = ["text", "dense", "pruned", *([] if tuned is None else ["fine-tuned"])]
    header += ["95 % interval", "bits per byte", "sequence length", "windows"]
    begins = None if report.bos is None else report.bos.line()
    said = "" if begins is None else f" The token that begins a text (BOS): {begins}."
    of = "" if tuned is None else "; it and the bits per byte are of the pruned model"
    note = f"Lower is better. Non-overlapping windows; the interval is a bootstrap over them{of}.{said}"
    charted = bars([(entry.data, _perplexity_bars(entry, tuned or {})) for entry in report.perplexity])
    return section(report.perplexity[0].title.capitalize(), charted, table(header, rows), note=note)


def _perplexity_bars(entry: PerplexityFacts, tuned: dict[str, float]) -> list[Bar]:
    found = [] if entry.dense is None else [Bar("dense", "dense", entry.dense, number(entry.dense))]
    found.append(Bar("pruned", "pruned", entry.pruned, number(entry.pruned), entry.pruned_interval))
    after = tuned.get(entry.data)
    return found if after is None else [*found, Bar("fine-tuned", "tuned", after, number(after))]


def _row(entry: PerplexityFacts, tuned: dict[str, float] | None) -> list[str]:
    interval = entry.pruned_interval
    after = [] if tuned is None else [number(tuned[entry.data]) if entry.data in tuned else "–"]
    return [
        entry.data,
        "–" if entry.dense is None else number(entry.dense),
        number(entry.pruned),
        *after,
        "–" if interval is None else f"{number(interval[0])} – {number(interval[1])}",
        "–" if entry.pruned_bits_per_byte is None else f"{entry.pruned_bits_per_byte:.4f}",
        str(entry.seqlen),
        str(entry.windows),
    ]


def number(value: float) -> str:
    """Return a perplexity with its significant digits."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"


_REACH = 1.96  # standard errors to either end of a 95 % interval


def zero_shot_card(facts: ZeroShotFacts | None) -> str:
    """Return the headline figure; empty without a mean."""
    if facts is None or facts.mean_pruned is None:
        return ""
    before = [] if facts.mean_dense is None else [f"{100 * facts.mean_dense.value:.2f}"]
    return card(
        "mean accuracy", from_to([*before, per_cent(facts.mean_pruned.value)]), f"over {len(facts.tasks)} tasks"
    )


def zero_shot_section(facts: ZeroShotFacts) -> str:
    """Return bars and a table of all tasks."""
    rows = [_zero_shot_row(task, metric) for task in facts.tasks for metric in task.pruned]
    if facts.mean_pruned is not None:
        rows.append(["mean", "acc", *facts.means_side_by_side(), "", ""])
    shots = {task.num_fewshot for task in facts.tasks}
    note = (
        f"lm-eval {facts.harness}, {', '.join(map(str, sorted(shots)))} examples before each question. Bars show 95 % "
        "intervals; the difference has the standard error over the same items."
    )
    header = ["task", "metric", "dense", "pruned", "difference", "items", "version"]
    charted = bars(
        [(task.task, _zero_shot_bars(task)) for task in facts.tasks if is_share(main_of(task.pruned))], top=1.0
    )
    return section("Zero-shot tasks", charted, table(header, rows), note=note)


def _zero_shot_row(task: TaskComparison, metric: str) -> list[str]:
    return [task.task, metric, *task.side_by_side(metric), str(task.items), str(task.version)]


def _zero_shot_bars(task: TaskComparison) -> list[Bar]:
    shown = []
    for kind, metrics in (("dense", task.dense), ("pruned", task.pruned)):
        if metrics is not None:
            shown.append(task_bar(kind, kind, metrics))
    return shown


def task_bar(name: str, kind: str, metrics: Mapping[str, Estimate]) -> Bar:
    """Return the bar of a model's result in a task, by its main metric, with a 95 % interval."""
    found = metrics[main_of(metrics)]
    reach = _REACH * (found.stderr or 0.0)
    return Bar(name, kind, found.value, per_cent(found.value), (found.value - reach, found.value + reach))
