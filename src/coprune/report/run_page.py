"""`report.html` of one run: what was pruned, the effect, and how to repeat it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from coprune.base.words import Sheet, per_cent
from coprune.evaluation.embeddings import EmbeddingChange
from coprune.evaluation.extra_measurements import TextSample
from coprune.evaluation.measurement import Interval
from coprune.evaluation.zero_shot import Estimate, TaskComparison, ZeroShotFacts, is_share, main_of
from coprune.pruning.distributions import TITLES, Distributions, Histogram
from coprune.pruning.pruner import MatrixResult
from coprune.report.answers_section import answers_section
from coprune.report.figures import AccuracyFacts, ChangedPrediction, PerplexityFacts
from coprune.report.heat_map import HeatMap, matrix_rows, place_of
from coprune.report.run_events import event_line
from coprune.report.schema import PhaseFacts, Report, training_line
from coprune.report.view import (
    Bar,
    Bars,
    Card,
    Copyable,
    Image,
    Images,
    Kind,
    Link,
    Page,
    Paragraph,
    Part,
    Picker,
    Quote,
    Quotes,
    Section,
    listed,
    made_parts,
)
from coprune.report.vocabulary_section import vocabulary_section
from coprune.report.wording import name_of, number, seconds, short, versions_line

_SAME = 0.001  # smaller differences in sparsity are shown as equal


def run_page(report: Report, links: Sequence[Link] = ()) -> str:
    """Build the page of one run. links: to related pages."""
    title = f"{name_of(report.model.source)}, pruned with {report.recipe.way}"
    kind = "Pruning" if report.finetuned is None else "Pruning and fine-tuning"
    return Page(kind, title, _lead(report), list(_sections(report)), list(_cards(report)), links).html()


def _sections(report: Report) -> Iterator[Section]:
    if report.perplexity:
        yield perplexity_section(report)
    if report.vocabulary is not None:
        yield vocabulary_section(report.vocabulary)
    if report.accuracy:
        yield from accuracy_sections(report.accuracy)
    if report.zero_shot is not None:
        yield zero_shot_section(report.zero_shot)
    if report.answers is not None:
        who = "pruned" if report.finetuned is None else "fine-tuned"
        yield answers_section(report.answers, report.required, who)
    if report.sample is not None:
        yield _sample(report.sample)
    yield from _matrices(report)
    if report.matrices:
        yield picker(report.matrices, report.model.block_names)
    yield from listed("Block reconstruction", [f"{one.block}: {training_line(one)}" for one in report.trainings])
    if report.events:
        yield from listed("Numerical events", [event.line() for event in report.events])
    else:
        yield Section(
            "Numerical events", note="None: no matrix needed more damping, a fallback or completed statistics."
        )
    if report.phases:
        yield _phases(report)
    yield _recipe(report)
    yield Section("Versions", note=versions_line(report.versions))


def _lead(report: Report) -> list[Part]:
    model, recipe, data = report.model, report.recipe, report.calibration
    said = (
        f"{model.source}: {model.model_type}, {model.blocks} blocks, {model.parameters:,} parameters in {model.dtype}. "
        f"Pattern {recipe.shape}, {recipe.calibrate.propagation} propagation."
    )
    if data is not None:
        samples = "images" if model.task == "images" else "samples"
        said += f" Calibrated on {data.nsamples} {samples} of {data.source}, seed {data.seed}.{data.details()}"
    found: list[Part] = [Paragraph(said, "soft")]
    if report.finetuned is not None:
        found.append(Paragraph(f"Then fine-tuned: {report.finetuned.line()}.", "soft"))
    if model.quantised_source:
        dequantised = "The weights were dequantised from a quantised file; all figures are of the dequantised model."
        found.append(Paragraph(dequantised, "warn"))
    return [*found, *made_parts(report.made)]


def _cards(report: Report) -> Iterator[Card]:
    if report.has_zeros:
        of_all = f"{per_cent(report.sparsity.model)} of all parameters, {len(report.matrices)} matrices"
        yield Card("zeros in the pruned matrices", [per_cent(report.sparsity.matrices)], of_all)
    yield from (perplexity_card(report, entry) for entry in report.perplexity)
    yield from map(accuracy_card, report.accuracy)
    yield from map(embedding_card, report.embeddings)
    for one in report.transcripts:
        yield Card(f"transcripts of {one.data}", [one.headline()], one.line("dense"))
    yield from zero_shot_cards(report.zero_shot)
    parameters = report.model.parameters if report.left is None else report.left
    left = parameters - round(report.sparsity.model * parameters)
    stored = "; stored dense" if report.has_zeros else ""
    stored += f"; stored with {short(report.padding)} zeros of padding" if report.padding else ""
    yield Card("weights left", [short(left)], f"of {short(report.model.parameters)}{stored}")
    total = f"to prune; {seconds(report.total_seconds)} in all{report.before()}"
    yield Card("time", [seconds(report.prune_seconds)], total)
    yield Card("peak memory", [f"{report.peak_memory_bytes / 2**30:.2f} GiB"], f"on {report.model.device}")


def _matrices(report: Report) -> Iterator[Section]:
    """Yield sparsity, if there is any (as a sentence if it is uniform), and layer error."""
    rows = matrix_rows(report.matrices, report.model.block_names)
    shares = [row["sparsity"] for row in rows if report.has_zeros]
    if shares and max(shares) - min(shares) < _SAME:
        least, most = per_cent(min(shares)), per_cent(max(shares))
        said = f"Every pruned matrix is {least} zeros."
        yield Section("Sparsity", note=said if least == most else f"Pruned matrices are {least} to {most} zeros.")
    elif shares:
        yield Section("Sparsity per block and kind of matrix", [HeatMap.of(rows, "sparsity")])
    if any(row["error"] is not None for row in rows):
        note = "‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration inputs of each matrix: the share of its output that was lost."
        yield Section("Layer error", [HeatMap.of(rows, "error")], note)


def _sample(sample: TextSample) -> Section:
    dense = [] if sample.dense is None else [Quote("dense", "dense", sample.dense, sample.prompt)]
    quotes = [*dense, Quote("pruned", "pruned", sample.pruned, sample.prompt)]
    return Section("A sample of text", [Quotes(quotes)], "The greedy continuation of one prompt.")


def _phases(report: Report) -> Section:
    gpu = any(phase.device_bytes is not None for phase in report.phases)
    columns: dict[str, Callable[[PhaseFacts], str]] = {
        "phase": lambda phase: phase.name,
        "time": lambda phase: seconds(phase.seconds),
        "resident memory at its end": lambda phase: _memory(phase.resident_bytes),
    }
    columns |= {"GPU memory at its end": lambda phase: _memory(phase.device_bytes)} if gpu else {}
    return Section("Time and memory", [Sheet.of(report.phases, columns)])


def _memory(used: int | None) -> str:
    return "–" if used is None else f"{used / 2**30:.2f} GiB"


def _recipe(report: Report) -> Section:
    note = (
        "A part of it was passed in Python, so it does not repeat the run by itself."
        if report.recipe.given
        else "Save it as recipe.yaml; coprune prune --recipe recipe.yaml repeats the run."
    )
    return Section("Recipe", [Copyable("recipe", report.recipe.as_stored().to_yaml())], note)


def accuracy_card(found: AccuracyFacts) -> Card:
    """Return the headline accuracy."""
    before = [] if found.dense_top1 is None else [f"{100 * found.dense_top1:.2f}"]
    figures = [*before, per_cent(found.pruned_top1)]
    return Card(f"top-1 accuracy on {found.data}", figures, f"of {found.images:,} {found.unit}")


def embedding_card(found: EmbeddingChange) -> Card:
    """Return the headline figure of an embedding model."""
    overlap = f"{per_cent(found.overlap)} of the {found.nearest} nearest of {found.passages:,} passages alike"
    return Card(f"cosine with the dense model on {found.data}", [f"{found.cosine:.4f}"], overlap)


def accuracy_sections(found: Sequence[AccuracyFacts]) -> Iterator[Section]:
    """Yield bars and a table of all image sets, and images whose predicted class changed."""
    columns: dict[str, Callable[[AccuracyFacts], str]] = {
        found[0].unit: lambda entry: entry.data,
        "number": lambda entry: f"{entry.images:,}",
        "dense top-1 %": lambda entry: _share(entry.dense_top1, entry.dense_top1_interval),
        "pruned top-1 %": lambda entry: _share(entry.pruned_top1, entry.pruned_top1_interval),
        "dense top-5 %": lambda entry: _share(entry.dense_top5, None),
        "pruned top-5 %": lambda entry: _share(entry.pruned_top5, entry.pruned_top5_interval),
        "changed class": lambda entry: "–" if entry.changed is None else f"{entry.changed:,}",
    }
    charted = Bars([(f"{entry.data}, top-1", _bars(entry)) for entry in found], top=1.0)
    yield Section("Accuracy", [charted, Sheet.of(found, columns)], "Intervals are 95 % Wilson intervals.")
    for entry in found:
        if images := [_image(one, one.thumbnail) for one in entry.examples if one.thumbnail is not None]:
            title = f"Images of {entry.data} whose predicted class changed"
            note = f"The first of {entry.changed:,}, with the true class and both predictions."
            yield Section(title, [Images(images)], note)


def _bars(entry: AccuracyFacts) -> list[Bar]:
    pruned = Bar("pruned", "pruned", entry.pruned_top1, per_cent(entry.pruned_top1), entry.pruned_top1_interval)
    if (dense := entry.dense_top1) is None:
        return [pruned]
    return [Bar("dense", "dense", dense, per_cent(dense), entry.dense_top1_interval), pruned]


def _share(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" + ("" if interval is None else f" [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]")


def _image(example: ChangedPrediction, uri: str) -> Image:
    names = example.names or tuple(map(str, (example.label, example.dense, example.pruned)))
    return Image(uri, example.image, *names)


_MOST = 600  # maximum number of matrices with histograms, at about 300 bytes each
# Each bin is one character; its height is in steps of less than a pixel.
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%()*+,-./:;=?@[]^_`{|}~"


def picker(matrices: Sequence[MatrixResult], blocks: Sequence[str]) -> Section:
    """Return the section with the list of matrices and their charts, or only figures without distributions."""
    note = "Before pruning, on a sample of its rows; input norms are over the calibration data."
    chosen = len(shown_matrices(matrices, blocks))
    if chosen < len(matrices):
        note += (
            f" {chosen:,} of the {len(matrices):,} matrices are shown, for experts the one with the largest error per block; "
            "distributions.json has all, and coprune inspect MODEL --plot NAME plots any."
        )
    return Section("One matrix", [Picker(TITLES, picker_data(matrices, blocks))], note)


def picker_data(matrices: Sequence[MatrixResult], blocks: Sequence[str]) -> dict[str, Any]:
    """Return the data for the page's script: a short list per matrix, and the digits of the bins."""
    return {"digits": _DIGITS, "matrices": [_matrix(matrix) for matrix in shown_matrices(matrices, blocks)]}


def shown_matrices(matrices: Sequence[MatrixResult], blocks: Sequence[str]) -> list[MatrixResult]:
    """Return the matrices to show: all, or the worst expert per block, or those of some blocks."""
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
    histograms = {} if found is None else {kind: getattr(found, kind) for kind in TITLES}
    return {kind: _packed(histogram) for kind, histogram in histograms.items() if histogram is not None}


def _packed(histogram: Histogram) -> list[Any]:
    """Return the ends, the largest count, and the bins of kept and pruned values as digits."""
    pruned = histogram.pruned or (0,) * len(histogram.kept)
    top = max(1, *(a + b for a, b in zip(histogram.kept, pruned, strict=True)))
    # Rounded up, so that every nonempty bin is visible.
    bins = ["".join(_DIGITS[math.ceil(n / top * (len(_DIGITS) - 1))] for n in row) for row in (histogram.kept, pruned)]
    return [round(histogram.low, 3), round(histogram.high, 3), top, bins[0], bins[1] if any(pruned) else ""]


def perplexity_card(report: Report, entry: PerplexityFacts) -> Card:
    """Return the perplexities of one text, the run's result last."""
    tuned = {} if report.finetuned is None else report.finetuned.perplexity
    figures = [*([] if entry.dense is None else [entry.dense]), entry.pruned]
    figures += [tuned[entry.data]] if entry.data in tuned else []
    return Card(f"{entry.title} on {entry.data}", list(map(number, figures)), f"sequence length {entry.seqlen}")


def perplexity_section(report: Report) -> Section:
    """Return bars and a table of all texts."""
    tuned = {} if report.finetuned is None else report.finetuned.perplexity
    columns: dict[str, Callable[[PerplexityFacts], str]] = {
        "text": lambda entry: entry.data,
        "dense": lambda entry: _number(entry.dense),
        "pruned": lambda entry: number(entry.pruned),
    }
    if report.finetuned is not None:
        columns["fine-tuned"] = lambda entry: _number(tuned.get(entry.data))
    columns |= {
        "95 % interval": lambda entry: " – ".join(map(number, entry.pruned_interval or ())) or "–",
        "bits per byte": lambda e: "–" if e.pruned_bits_per_byte is None else f"{e.pruned_bits_per_byte:.4f}",
        "sequence length": lambda entry: str(entry.seqlen),
        "windows": lambda entry: str(entry.windows),
    }
    begins = None if report.bos is None else report.bos.line()
    said = "" if begins is None else f" BOS token: {begins}."
    of = "" if report.finetuned is None else "; it and the bits per byte are those of the pruned model"
    note = f"Lower is better. Non-overlapping windows; the interval is a bootstrap over them{of}.{said}"
    charted = Bars([(entry.data, _perplexity_bars(entry, tuned)) for entry in report.perplexity])
    return Section(report.perplexity[0].title.capitalize(), [charted, Sheet.of(report.perplexity, columns)], note)


def _number(value: float | None) -> str:
    return "–" if value is None else number(value)


def _perplexity_bars(entry: PerplexityFacts, tuned: dict[str, float]) -> list[Bar]:
    found = [] if entry.dense is None else [Bar("dense", "dense", entry.dense, number(entry.dense))]
    found.append(Bar("pruned", "pruned", entry.pruned, number(entry.pruned), entry.pruned_interval))
    after = tuned.get(entry.data)
    return found if after is None else [*found, Bar("fine-tuned", "tuned", after, number(after))]


_REACH = 1.96  # standard errors to either end of a 95 % interval


def zero_shot_cards(facts: ZeroShotFacts | None) -> list[Card]:
    """Return the headline mean accuracy, if any."""
    if facts is None or facts.mean_pruned is None:
        return []
    before = [] if facts.mean_dense is None else [f"{100 * facts.mean_dense.value:.2f}"]
    return [Card("mean accuracy", [*before, per_cent(facts.mean_pruned.value)], f"over {len(facts.tasks)} tasks")]


def zero_shot_section(facts: ZeroShotFacts) -> Section:
    """Return bars and a table of all tasks."""
    rows = [
        [task.task, metric, *task.side_by_side(metric), str(task.items), str(task.version)]
        for task in facts.tasks
        for metric in task.pruned
    ]
    if facts.mean_pruned is not None:
        rows.append(["mean", "acc", *facts.means_side_by_side(), "", ""])
    shots = {task.num_fewshot for task in facts.tasks}
    note = (
        f"lm-eval {facts.harness}, {', '.join(map(str, sorted(shots)))} examples before each question. Bars show 95 % "
        "intervals; the difference has the standard error over the same items."
    )
    header = ["task", "metric", "dense", "pruned", "difference", "items", "version"]
    charted = [(task.task, _zero_shot_bars(task)) for task in facts.tasks if is_share(main_of(task.pruned))]
    return Section("Zero-shot tasks", [Bars(charted, top=1.0), Sheet("", rows, header)], note)


def _zero_shot_bars(task: TaskComparison) -> list[Bar]:
    dense = [] if task.dense is None else [task_bar("dense", "dense", task.dense)]
    return [*dense, task_bar("pruned", "pruned", task.pruned)]


def task_bar(name: str, kind: Kind, metrics: Mapping[str, Estimate]) -> Bar:
    """Return the bar of a model's result in a task, by its main metric, with a 95 % interval."""
    found = metrics[main_of(metrics)]
    reach = _REACH * (found.stderr or 0.0)
    return Bar(name, kind, found.value, per_cent(found.value), (found.value - reach, found.value + reach))
