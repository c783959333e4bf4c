"""`report.html` of a fine-tuning: figures before and after, the curves, what the model writes, and the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from coprune.base.environment import expand_home
from coprune.base.files import write_text
from coprune.base.validation import read_as
from coprune.base.words import per_cent
from coprune.recipe.train import has_teacher
from coprune.report.answers import answers_section
from coprune.report.html import (
    Bar,
    bars,
    card,
    copyable,
    from_to,
    header,
    made_lines,
    page,
    panel,
    seconds,
    section,
    short,
    table,
    text,
)
from coprune.report.links import PAGE_FILE, links_of_finetuning
from coprune.report.page import number
from coprune.report.plot import Axis, Line, Plot, Point
from coprune.training.report import REPORT_FILE, FinetuneReport

_MOST_POINTS = 400  # of a curve; more are averaged, which no page could show apart


def is_finetuning(folder: Path) -> bool:
    """Return whether a folder holds a fine-tuning."""
    return (folder / REPORT_FILE).is_file()


def write_finetune_page(folder: Path, path: Path | None = None) -> None:
    """Write the page of a finished fine-tuning. path: by default in its folder. Raises BadInput for one that has not ended."""
    write_page_of(read_as(FinetuneReport, folder / REPORT_FILE), folder, path or folder / PAGE_FILE)


def write_page_of(report: FinetuneReport, folder: Path, path: Path) -> None:
    """Write the page of a report. folder: of the run; path: the page."""
    write_text(path, finetune_page(report, links_of_finetuning(folder, expand_home(report.settings.model.name))))


def finetune_page(report: FinetuneReport, links: Sequence[str] = ()) -> str:
    """Build the page. links: to pages that belong to it, HTML."""
    parts = [_head(report, links), _cards(report), _perplexity(report), _accuracy(report), _curves(report)]
    if report.answers is not None:
        parts.append(answers_section(report.answers, report.required, "fine-tuned"))
    parts += [_zeros(report), _settings(report)]
    return page(f"{_name(report)}, fine-tuned", "\n".join(parts))


def _name(report: FinetuneReport) -> str:
    return Path(report.settings.model.name).name or report.settings.model.name


def _steps(report: FinetuneReport) -> str:
    return f"{report.steps:,} step{'' if report.steps == 1 else 's'}"


def _head(report: FinetuneReport, links: Sequence[str]) -> str:
    lead = (
        f'<p class="soft">{text(report.settings.model.name)}: {report.trained_parameters:,} parameters trained for '
        f"{_steps(report)} on {report.windows:,} {report.samples} of {text(report.source)}, "
        f"seed {report.settings.calibrate.seed}.</p>"
    )
    title = f"{_name(report)}, fine-tuned by {report.settings.train.mode}"
    return header("Fine-tuning", title, lead, made_lines(report.made), links)


def _cards(report: FinetuneReport) -> str:
    cards = [
        card(
            f"perplexity on {found.data}",
            from_to([number(found.before), number(found.after)]),
            f"sequence length {found.seqlen}",
        )
        for found in report.perplexity
    ]
    cards += [
        card(
            f"top-1 accuracy on {found.data}",
            from_to([f"{100 * found.before_top1:.2f}", per_cent(found.after_top1)]),
            f"of {found.images:,} images",
        )
        for found in report.accuracy
    ]
    cards += [
        card(
            f"cosine with dense on {found.data}",
            from_to([f"{found.before.cosine:.4f}", f"{found.after.cosine:.4f}"]),
            f"overlap@{found.after.nearest} {per_cent(found.before.overlap)} → {per_cent(found.after.overlap)}",
        )
        for found in report.embeddings
    ]
    cards += [
        card(
            f"word error on {found.data}",
            from_to([per_cent(found.dense), per_cent(found.pruned)]),
            f"{found.recordings:,} recordings",
        )
        for found in report.transcripts
        if found.dense is not None and found.pruned is not None
    ]
    if report.pruned_matrices:
        zeros = card("zeros kept", per_cent(report.sparsity_after), f"in {report.pruned_matrices:,} pruned matrices")
        cards.append(zeros)
    cards.append(card("trained", short(report.trained_parameters), f"parameters by {report.settings.train.mode}"))
    cards.append(card("time", seconds(report.seconds), _steps(report)))
    return f'<div class="cards">{"".join(cards)}</div>'


def _perplexity(report: FinetuneReport) -> str:
    """Return bars of perplexity before and after, on every text."""
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
    note = "Lower is better; on text that training never saw."
    return section("Perplexity", bars(groups), note=note) if groups else ""


def _accuracy(report: FinetuneReport) -> str:
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
    if not groups:
        return ""
    rows = [
        [found.data, per_cent(found.before_top5), per_cent(found.after_top5), f"{found.images:,}"]
        for found in report.accuracy
    ]
    shown = table(["images", "top-5 before", "top-5 after", "number"], rows)
    return section("Accuracy", bars(groups, top=1.0), shown, note="Lines are Wilson's 95 % intervals.")


def _curves(report: FinetuneReport) -> str:
    """Return the training and held-out losses, and separately the learning rate and gradients."""
    if not report.curve:
        return ""
    training = [(float(one.step), one.loss) for one in report.curve]
    held_out = [(float(one.step), one.loss) for one in report.held_out]
    apart = has_teacher(report.settings.train.mode)  # whose objective is another quantity than the data's loss
    charts = [_curve("training loss" if not apart else "objective of the distillation", training, "training")]
    if held_out:
        charts.append(_curve("loss on held-out samples", held_out, "heldout"))
    charts.append(_curve("learning rate", [(float(one.step), one.learning_rate) for one in report.curve], "training"))
    norms = [(float(one.step), one.gradient_norm) for one in report.curve if one.gradient_norm is not None]
    if norms:
        charts.append(_curve("gradient norm", norms, "training"))
    note = "Losses are in nats per token, or per image." if not apart else ""
    return section("Training curves", panel(f'<div class="curves">{"".join(charts)}</div>', whole=False), note=note)


def _curve(title: str, places: Sequence[tuple[float, float]], kind: str) -> str:
    """Return one curve with fitting axes; a few points are marked."""
    drawn = _thinned(places)
    x = Axis.of("step", [at for at, _ in drawn], lambda value: f"{value:,.0f}")
    x = replace(x, ticks=[tick for tick in x.ticks if tick[0] == round(tick[0])])  # there is no half step
    y = Axis.of(title, [value for _, value in drawn], lambda value: f"{value:.4g}")
    series = 3 if kind == "heldout" else 1
    points = (
        [Point(at, value, series, f"step {at:,.0f}: {value:.4g}") for at, value in drawn] if len(drawn) <= 30 else []
    )
    return f'<div class="small">{Plot(x, y, points, [Line(drawn, kind)]).html()}</div>'


def _thinned(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = -(-len(places) // _MOST_POINTS)
    groups = [places[start : start + every] for start in range(0, len(places), every)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _zeros(report: FinetuneReport) -> str:
    said = [f"{one.line()}." for one in report.removed]
    if report.pruned_matrices:
        patterns = ", ".join(f"{count} × {name}" for name, count in report.patterns.items())
        said.append(
            f"{per_cent(report.sparsity_before)} of {report.pruned_matrices:,} matrices ({patterns}) were zeros before, "
            f"{per_cent(report.sparsity_after)} are after (every zero kept); the masks were verified at every save."
        )
    return section("Zeros", note=" ".join(said)) if said else ""


def _settings(report: FinetuneReport) -> str:
    content = report.settings.to_yaml(usual=False)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return section("Settings", copyable("settings", content), note="Those that are not at their defaults.") + section(
        "Versions", note=versions
    )
