"""The figures of compared models, as numbers and as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from coprune.base.words import Sheet, Shown, per_cent
from coprune.evaluation.answers.answer_records import Way
from coprune.evaluation.changes import AccuracyChange, Row
from coprune.evaluation.embeddings import EmbeddingChange
from coprune.evaluation.measurement import Accuracy, Interval, Perplexity
from coprune.evaluation.transcripts import TranscriptChange
from coprune.evaluation.zero_shot import MAIN_METRIC, Estimate, shown


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of compared models; the first model is the baseline."""
    first = rows[0].evaluation
    columns = [
        plain("parameters", lambda row: row.evaluation.weights.parameters, "{:,}"),
        plain("non-zeros", lambda row: row.evaluation.weights.nonzeros, "{:,}"),
        share("sparsity", lambda row: row.evaluation.weights.sparsity),
        share("matrix sparsity", lambda row: row.evaluation.weights.matrix_sparsity),
        plain("bytes", lambda row: row.evaluation.weights.bytes_on_disk, "{:,}"),
    ]
    for index, result in enumerate(first.perplexity):
        columns += _perplexity_columns(result, index)
    for index, accuracy in enumerate(first.accuracy):
        columns += _accuracy_columns(accuracy.data, index)
    nearest = next((row.evaluation.closeness for row in rows if row.evaluation.closeness), ())
    for index, near in enumerate(nearest):
        columns += _closeness_columns(near.data, index)
    close = next((row.evaluation.near for row in rows if row.evaluation.near), ())
    for index, one in enumerate(close):
        columns += (
            _embedding_columns(one, index) if isinstance(one, EmbeddingChange) else _transcript_columns(one, index)
        )
    if first.answers is not None:
        columns += answer_columns(first.answers.sampled is not None, against=len(rows) > 1)
    if first.zero_shot is not None:
        for index, task in enumerate(first.zero_shot.tasks):
            columns += _task_columns(task.task, task.main_metric, index)
        columns += [
            _estimate("mean acc", lambda row: row.zero_shot.mean_pruned if row.zero_shot else None),
            _estimate("Δ mean acc", lambda row: row.zero_shot.mean_delta if row.zero_shot else None, signed=True),
        ]
    return columns


def _estimate(
    title: str, estimate: Callable[[Row], Estimate | None], metric: str = MAIN_METRIC, signed: bool = False
) -> Column:
    def value(row: Row) -> Number:
        found = estimate(row)
        return None if found is None else found.value

    def show(row: Row) -> str:
        found = estimate(row)
        return "" if found is None else shown(metric, found, "+" if signed else "")

    return Column(title, value, show)


def _perplexity_columns(first: Perplexity, index: int) -> list[Column]:
    data = first.data

    def ratio(row: Row) -> Number:
        return None if row.perplexity_changes is None else row.perplexity_changes[index].ratio

    def show_ratio(row: Row) -> str:
        change = None if row.perplexity_changes is None else row.perplexity_changes[index]
        if change is None or change.ratio is None:
            return ""
        interval = change.ratio_interval
        return f"× {change.ratio:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")

    return [
        plain(f"{first.title} {data}", lambda row: row.evaluation.perplexity[index].value, "{:.2f}"),
        Column(f"ratio {data}", ratio, show_ratio),
        plain(f"bits per byte {data}", lambda row: row.evaluation.perplexity[index].bits_per_byte, "{:.4f}"),
    ]


def _accuracy_columns(data: str, index: int) -> list[Column]:
    def found(row: Row) -> Accuracy:
        return row.evaluation.accuracy[index]

    def change(row: Row) -> AccuracyChange | None:
        return None if row.accuracy_changes is None else row.accuracy_changes[index]

    return [
        _share(f"top-1 {data}", lambda row: found(row).top1, lambda row: found(row).top1_interval),
        _share(
            f"Δ top-1 {data}",
            lambda row: None if (it := change(row)) is None else it.top1_difference,
            lambda row: None if (it := change(row)) is None else it.top1_interval,
            signed=True,
        ),
        _share(f"top-5 {data}", lambda row: found(row).top5, lambda row: found(row).top5_interval),
        share(f"same class {data}", lambda row: None if (it := change(row)) is None else it.agreement),
    ]


def _share(
    title: str, value: Callable[[Row], float | None], interval: Callable[[Row], Interval | None], signed: bool = False
) -> Column:
    """Return a share, or a difference of shares, in per cent with its interval."""
    sign = "+" if signed else ""

    def show(row: Row) -> str:
        number, ends = value(row), interval(row)
        if number is None:
            return ""
        spread = "" if ends is None else f" [{100 * ends[0]:{sign}.2f}, {100 * ends[1]:{sign}.2f}]"
        return f"{100 * number:{sign}.2f}{spread} %"

    return Column(title, value, show)


def _closeness_columns(data: str, index: int) -> list[Column]:
    def kl(row: Row) -> Number:
        return row.evaluation.closeness[index].kl if row.evaluation.closeness else None

    def agreement(row: Row) -> Number:
        return row.evaluation.closeness[index].top1_agreement if row.evaluation.closeness else None

    return [plain(f"KL {data}", kl, "{:.4f}"), share(f"top-1 agreement {data}", agreement)]


def _embedding_columns(first: EmbeddingChange, index: int) -> list[Column]:
    def cosine(row: Row) -> Number:
        return getattr(row.evaluation.near[index], "cosine", None) if row.evaluation.near else None

    def overlap(row: Row) -> Number:
        return getattr(row.evaluation.near[index], "overlap", None) if row.evaluation.near else None

    return [
        plain(f"cosine {first.data}", cosine, "{:.4f}"),
        share(f"overlap@{first.nearest} {first.data}", overlap),
    ]


def _transcript_columns(first: TranscriptChange, index: int) -> list[Column]:
    def error(row: Row) -> Number:
        return row.evaluation.transcripts[index].word_error if row.evaluation.transcripts else None

    def agreement(row: Row) -> Number:
        return getattr(row.evaluation.near[index], "agreement", None) if row.evaluation.near else None

    return [share(f"word error {first.data}", error), share(f"words alike {first.data}", agreement)]


def _task_columns(task: str, metric: str, index: int) -> list[Column]:
    def score(row: Row) -> Estimate | None:
        return None if row.zero_shot is None else row.zero_shot.tasks[index].pruned.get(metric)

    def delta(row: Row) -> Estimate | None:
        found = None if row.zero_shot is None else row.zero_shot.tasks[index].delta
        return None if found is None else found.get(metric)

    return [
        _estimate(f"{task} {metric}", score, metric),
        _estimate(f"Δ {task} {metric}", delta, metric, signed=True),
    ]


Number = float | int | None


@dataclass(frozen=True)
class Column:
    """One figure of every row. value: the bare number; show: formats it."""

    title: str
    value: Callable[[Row], Number]
    show: Callable[[Row], str]


def plain(title: str, value: Callable[[Row], Number], form: str) -> Column:
    """Make a column of numbers. form: a format for `str.format`."""

    def show(row: Row) -> str:
        number = value(row)
        return "" if number is None else form.format(number)

    return Column(title, value, show)


def share(title: str, value: Callable[[Row], Number], digits: int = 2) -> Column:
    """Make a column of shares, shown in per cent."""

    def show(row: Row) -> str:
        number = value(row)
        return "" if number is None else per_cent(number, digits)

    return Column(title, value, show)


_FIGURES = {
    "loops": ("answers that loop", "{}"),
    "empty": ("answers that are empty", "{}"),
    "ended": ("answers that end", "{}"),
    "tokens": ("tokens per answer", "{:.1f}"),
}


def answer_columns(sampled: bool, against: bool) -> list[Column]:
    """Make the columns of answers. sampled: whether answers were sampled too; against: whether there are two models."""
    columns = _columns("greedy")
    if against:
        columns.append(plain("KL along answers", lambda row: _along(row, "kl"), "{:.4f}"))
        columns.append(plain("acceptance along answers", lambda row: _along(row, "acceptance"), "{:.4f}"))
    return columns + (_columns("sampled") if sampled else [])


def _along(row: Row, figure: str) -> Number:
    facts = row.evaluation.answers
    return None if facts is None or facts.along is None else getattr(facts.along, figure)


def _columns(name: str) -> list[Column]:
    def way(row: Row) -> Way | None:
        facts = row.evaluation.answers
        return None if facts is None else facts.greedy if name == "greedy" else facts.sampled

    def figure(field: str, title: str, form: str) -> Column:
        def value(row: Row) -> Number:
            found = way(row)
            return None if found is None else getattr(found.figures, field)

        return plain(f"{title}, {name}", value, form)

    return [figure(field, *shown) for field, shown in _FIGURES.items()]


class Comparison(Shown, BaseModel):
    """Evaluations of several models; the first row is the baseline."""

    model_config = ConfigDict(frozen=True)

    rows: tuple[Row, ...]

    def headline(self) -> str:
        """Return the names of the compared models."""
        first, *others = (row.name for row in self.rows)
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        return f"{', '.join(others[:3])}{more} with {first}"

    def sheet(self) -> Sheet:
        """Return models as columns and figures as rows, since there are more figures than models."""
        rows = [(column.title, *map(column.show, self.rows)) for column in columns_of(self.rows)]
        return Sheet(self.headline(), rows, ("", *(row.name for row in self.rows)))

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        return self.sheet().markdown() + "\n"

    def to_csv(self) -> str:
        """Return one line per model, with plain numbers (fractions, not per cent) and empty fields for missing ones."""
        columns = columns_of(self.rows)
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["model", *(column.title for column in columns)])
        for row in self.rows:
            values = (column.value(row) for column in columns)
            writer.writerow([row.name, *("" if value is None else repr(value) for value in values)])
        return stream.getvalue()
