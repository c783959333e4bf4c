"""The page of a comparison: all measurements of every model, as charts and one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coprune.base.environment import expand_home
from coprune.base.words import Sheet, per_cent
from coprune.evaluation.changes import Row
from coprune.evaluation.comparison_table import Comparison
from coprune.evaluation.zero_shot import is_share, main_of
from coprune.report.fronts import Reached, fronts
from coprune.report.links import PAGE_FILE, target
from coprune.report.provenance import MadeFacts
from coprune.report.run_page import task_bar
from coprune.report.view import Bar, Bars, Kind, Link, Page, Paragraph, Quote, Quotes, Section, made_parts
from coprune.report.wording import number

_SAMPLES = 12
_MOST_LETTERS = 600
_COLUMNS = 5  # models that fit side by side in a table


def comparison_page(found: Comparison, made: MadeFacts | None = None, beside: Path | None = None) -> str:
    """Build the page. made: how the comparison was made; beside: the page's folder, to which links are relative."""
    rows = found.rows
    first, *others = (row.name for row in rows)
    lead = [Paragraph(f"All models are compared with the first, {first}.", "soft")]
    sections = [*_perplexity(rows), *_size(rows), *_accuracy(rows), *_tasks(rows), _table(found), *_answers(rows)]
    return Page(
        "Comparison",
        f"{', '.join(others[:3])} compared with {first}",
        [*lead, *([] if made is None else made_parts(made))],
        sections,
        links=[] if beside is None else _links(rows, beside),
        heading=f"{len(rows)} models",
    ).html()


def _links(rows: Sequence[Row], beside: Path) -> list[Link]:
    """Return links to the pages of the models' runs, by number in the table."""
    pages = [(place, row.name, target(expand_home(row.name) / PAGE_FILE, beside)) for place, row in enumerate(rows, 1)]
    return [Link(address, f"{place} {name}") for place, name, address in pages if address is not None]


def _kind(place: int) -> Kind:
    """Return the colour of a row; the baseline has the dense model's."""
    return "dense" if place == 0 else "pruned"


def _perplexity(rows: Sequence[Row]) -> list[Section]:
    """Return bars for each text."""
    groups = []
    for index, text_ in enumerate(rows[0].evaluation.perplexity):
        found = [row.evaluation.perplexity[index] for row in rows]
        figures = [(one.value, number(one.value), one.interval) for one in found]
        groups.append((f"{text_.data}, sequence length {text_.seqlen}", _bars(rows, figures)))
    note = "Lower is better; lines are 95 % bootstrap intervals over the windows."
    return [Section("Perplexity", [Bars(groups)], note)] if groups else []


def _bars(rows: Sequence[Row], figures: Sequence[tuple[float, str, tuple[float, float] | None]]) -> list[Bar]:
    """Return a bar per model. figures: value, text and optional interval of each."""
    return [Bar(row.name, _kind(place), *of) for place, (row, of) in enumerate(zip(rows, figures, strict=True))]


def _size(rows: Sequence[Row]) -> list[Section]:
    """Return plots of perplexity against sparsity and file size."""
    parts = []
    for index, text_ in enumerate(rows[0].evaluation.perplexity if len(rows) > 2 else ()):
        reached = [
            Reached(
                row.name,
                "baseline" if place == 0 else "others",
                row.evaluation.perplexity[index].value,
                round(row.evaluation.weights.sparsity, 4),
                row.evaluation.weights.bytes_on_disk,
                str(place + 1),
            )
            for place, row in enumerate(rows)
        ]
        parts += fronts(f"Perplexity on {text_.data}", "Numbers refer to the models in the table.", reached)
    return parts


def _accuracy(rows: Sequence[Row]) -> list[Section]:
    groups = []
    for index, images in enumerate(rows[0].evaluation.accuracy):
        found = [row.evaluation.accuracy[index] for row in rows]
        figures = [(one.top1, per_cent(one.top1), one.top1_interval) for one in found]
        groups.append((f"{images.data}, top-1 of {images.images:,} images", _bars(rows, figures)))
    return [Section("Accuracy", [Bars(groups, top=1.0)], "Lines are 95 % intervals.")] if groups else []


def _tasks(rows: Sequence[Row]) -> list[Section]:
    """Return bars for every zero-shot task."""
    names = [] if rows[0].zero_shot is None else [task.task for task in rows[0].zero_shot.tasks]
    groups = []
    for index, name in enumerate(names):
        bars_ = []
        for place, row in enumerate(rows):
            metrics = {} if row.zero_shot is None else row.zero_shot.tasks[index].pruned
            if metrics and is_share(main_of(metrics)):
                bars_.append(task_bar(row.name, _kind(place), metrics))
        groups.append((name, bars_))
    return [Section("Zero-shot tasks", [Bars(groups, top=1.0)], "Lines are 95 % intervals.")] if groups else []


def _table(found: Comparison) -> Section:
    """Return the table with models as columns, or as rows if there are many."""
    sheet = found.sheet()
    names = [f"{place} {row.name}" for place, row in enumerate(found.rows, 1)]
    if len(names) <= _COLUMNS:
        return Section("Everything measured", [Sheet("", sheet.rows, ["", *names])])
    figures, *rows = zip(*sheet.rows, strict=True)
    turned = [[name, *cells] for name, cells in zip(names, rows, strict=True)]
    return Section("Everything measured", [Sheet("", turned, ["model", *map(str, figures)])])


def _answers(rows: Sequence[Row]) -> list[Section]:
    """Return the models' answers to each prompt side by side."""
    known = [(place, row.name, row.evaluation.answers) for place, row in enumerate(rows)]
    told = [(place, name, answers.samples) for place, name, answers in known if answers is not None]
    if not told:
        return []
    parts = []
    for index, sample in enumerate(told[0][2][:_SAMPLES]):
        quotes = [
            Quote(
                _kind(place), f"{name}, loops" if samples[index].loops else name, samples[index].answer[:_MOST_LETTERS]
            )
            for place, name, samples in told
            if index < len(samples)
        ]
        parts.append(Quotes(quotes, asked=sample.prompt))
    return [Section("What they write", parts, "The greedy answer of every model.")]
