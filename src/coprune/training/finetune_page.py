"""`report.html` of a fine-tuning: measurements before and after, training curves, generated answers, settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from coprune.base.environment import expand_home
from coprune.base.files import write_text
from coprune.base.validation import read_as
from coprune.base.words import Sheet, per_cent
from coprune.recipe.train_part import has_teacher
from coprune.report.answers_section import answers_section
from coprune.report.links import PAGE_FILE, links_of_finetuning
from coprune.report.plot import Axis, Line, Plot, Point
from coprune.report.view import Bar, Bars, Card, Copyable, Curves, Link, Page, Paragraph, Section, made_parts
from coprune.report.wording import number, seconds, short, versions_line
from coprune.training.finetune_report import REPORT_FILE, AccuracyChange, FinetuneReport

_MOST_POINTS = 400  # per curve; more are averaged, since a page could not show them apart


def is_finetuning(folder: Path) -> bool:
    """Return whether a folder holds a fine-tuning."""
    return (folder / REPORT_FILE).is_file()


def write_finetune_page(folder: Path, path: Path | None = None) -> None:
    """Write the page of a finished fine-tuning. path: by default in its folder. Raises BadInput if it is unfinished."""
    write_page_of(read_as(FinetuneReport, folder / REPORT_FILE), folder, path or folder / PAGE_FILE)


def write_page_of(report: FinetuneReport, folder: Path, path: Path) -> None:
    """Write the page of a report. folder: of the run; path: of the page."""
    write_text(path, finetune_page(report, links_of_finetuning(folder, expand_home(report.settings.model.name))))


def finetune_page(report: FinetuneReport, links: Sequence[Link] = ()) -> str:
    """Build the page. links: to related pages."""
    settings = report.settings
    name = Path(settings.model.name).name or settings.model.name
    lead = (
        f"{settings.model.name}: {report.trained_parameters:,} parameters trained for {_steps(report)} on "
        f"{report.windows:,} {report.samples} of {report.source}, seed {settings.calibrate.seed}."
    )
    return Page(
        "Fine-tuning",
        f"{name}, fine-tuned",
        [Paragraph(lead, "soft"), *made_parts(report.made)],
        list(_sections(report)),
        list(_cards(report)),
        links,
        heading=f"{name}, fine-tuned by {settings.train.mode}",
    ).html()


def _sections(report: FinetuneReport) -> Iterator[Section]:
    if report.perplexity:
        yield _perplexity(report)
    if report.accuracy:
        yield _accuracy(report)
    if report.curve:
        yield _curves(report)
    if report.answers is not None:
        yield answers_section(report.answers, report.required, "fine-tuned")
    if said := _zeros(report):
        yield Section("Zeros", note=said)
    recipe = Copyable("settings", report.settings.to_yaml(usual=False))
    yield Section("Settings", [recipe], "Those that differ from their defaults.")
    yield Section("Versions", note=versions_line(report.versions))


def _steps(report: FinetuneReport) -> str:
    return f"{report.steps:,} step{'' if report.steps == 1 else 's'}"


def _cards(report: FinetuneReport) -> Iterator[Card]:
    for text in report.perplexity:
        figures = [number(text.before), number(text.after)]
        yield Card(f"perplexity on {text.data}", figures, f"sequence length {text.seqlen}")
    for images in report.accuracy:
        figures = [f"{100 * images.before_top1:.2f}", per_cent(images.after_top1)]
        yield Card(f"top-1 accuracy on {images.data}", figures, f"of {images.images:,} images")
    for vectors in report.embeddings:
        before, after = vectors.before, vectors.after
        overlap = f"overlap@{after.nearest} {per_cent(before.overlap)} → {per_cent(after.overlap)}"
        figures = [f"{before.cosine:.4f}", f"{after.cosine:.4f}"]
        yield Card(f"cosine with dense on {vectors.data}", figures, overlap)
    for heard in report.transcripts:
        if heard.dense is not None and heard.pruned is not None:
            figures = [per_cent(heard.dense), per_cent(heard.pruned)]
            yield Card(f"word error on {heard.data}", figures, f"{heard.recordings:,} recordings")
    if report.pruned_matrices:
        matrices = f"in {report.pruned_matrices:,} pruned matrices"
        yield Card("zeros kept", [per_cent(report.sparsity_after)], matrices)
    yield Card("trained", [short(report.trained_parameters)], f"parameters by {report.settings.train.mode}")
    yield Card("time", [seconds(report.seconds)], _steps(report))


def _perplexity(report: FinetuneReport) -> Section:
    """Return bars of the perplexity before and after, for every text."""
    groups = [
        (
            f"{found.data}, sequence length {found.seqlen}",
            [
                Bar("before", "pruned", found.before, number(found.before)),
                Bar("after", "tuned", found.after, number(found.after)),
            ],
        )
        for found in report.perplexity
    ]
    return Section("Perplexity", [Bars(groups)], "On text not used for training; lower is better.")


def _accuracy(report: FinetuneReport) -> Section:
    groups = [
        (
            f"{found.data}, top-1 of {found.images:,} images",
            [
                Bar("before", "pruned", found.before_top1, per_cent(found.before_top1), found.before_top1_interval),
                Bar("after", "tuned", found.after_top1, per_cent(found.after_top1), found.after_top1_interval),
            ],
        )
        for found in report.accuracy
    ]
    columns: dict[str, Callable[[AccuracyChange], str]] = {
        "images": lambda found: found.data,
        "top-5 before": lambda found: per_cent(found.before_top5),
        "top-5 after": lambda found: per_cent(found.after_top5),
        "number": lambda found: f"{found.images:,}",
    }
    shown = Sheet.of(report.accuracy, columns)
    return Section("Accuracy", [Bars(groups, top=1.0), shown], "Lines are Wilson's 95 % intervals.")


def _curves(report: FinetuneReport) -> Section:
    """Return the training and held-out losses, and separately the learning rate and gradients."""
    training = [(float(one.step), one.loss) for one in report.curve]
    held_out = [(float(one.step), one.loss) for one in report.held_out]
    apart = has_teacher(
        report.settings.train.mode
    )  # the objective of distillation does not compare with the data's loss
    charts = [_curve("training loss" if not apart else "objective of the distillation", training, "training")]
    if held_out:
        charts.append(_curve("loss on held-out samples", held_out, "heldout"))
    charts.append(_curve("learning rate", [(float(one.step), one.learning_rate) for one in report.curve], "training"))
    norms = [(float(one.step), one.gradient_norm) for one in report.curve if one.gradient_norm is not None]
    if norms:
        charts.append(_curve("gradient norm", norms, "training"))
    note = "Losses are in nats per token, or per image." if not apart else ""
    return Section("Training curves", [Curves(charts)], note)


def _curve(title: str, places: Sequence[tuple[float, float]], kind: str) -> Plot:
    """Return a curve with fitted axes; its points are marked if there are few."""
    drawn = _thinned(places)
    x = Axis.of("step", [at for at, _ in drawn], lambda value: f"{value:,.0f}")
    x = replace(x, ticks=[tick for tick in x.ticks if tick[0] == round(tick[0])])  # steps are whole numbers
    y = Axis.of(title, [value for _, value in drawn], lambda value: f"{value:.4g}")
    series = 3 if kind == "heldout" else 1
    points = (
        [Point(at, value, series, f"step {at:,.0f}: {value:.4g}") for at, value in drawn] if len(drawn) <= 30 else []
    )
    return Plot(x, y, points, [Line(drawn, kind)])


def _thinned(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = -(-len(places) // _MOST_POINTS)
    groups = [places[start : start + every] for start in range(0, len(places), every)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _zeros(report: FinetuneReport) -> str:
    said = [f"{one.line()}." for one in report.removed]
    if report.pruned_matrices:
        patterns = ", ".join(f"{count} × {name}" for name, count in report.patterns.items())
        said.append(
            f"{per_cent(report.sparsity_before)} of {report.pruned_matrices:,} matrices ({patterns}) was zero before, "
            f"{per_cent(report.sparsity_after)} is zero after (every zero kept); the masks were verified at every save."
        )
    return " ".join(said)
