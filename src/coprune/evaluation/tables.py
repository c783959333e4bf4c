"""The figures of compared models: which there are, as bare numbers and for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coprune.evaluation.answer_columns import answer_columns
from coprune.evaluation.changes import AccuracyChange, Row
from coprune.evaluation.columns import Column, Number, plain, share
from coprune.evaluation.measurement import Accuracy, Interval
from coprune.evaluation.zero_shot import MAIN_METRIC, Estimate, shown


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns that compared models fill; the first of them is the baseline."""
    first = rows[0].evaluation
    columns = [
        plain("parameters", lambda row: row.evaluation.weights.parameters, "{:,}"),
        plain("non-zeros", lambda row: row.evaluation.weights.nonzeros, "{:,}"),
        share("sparsity", lambda row: row.evaluation.weights.sparsity),
        share("matrix sparsity", lambda row: row.evaluation.weights.matrix_sparsity),
        plain("bytes", lambda row: row.evaluation.weights.bytes_on_disk, "{:,}"),
    ]
    for index, result in enumerate(first.perplexity):
        columns += _perplexity_columns(result.data, index)
    for index, accuracy in enumerate(first.accuracy):
        columns += _accuracy_columns(accuracy.data, index)
    nearest = next((row.evaluation.closeness for row in rows if row.evaluation.closeness), ())
    for index, near in enumerate(nearest):
        columns += _closeness_columns(near.data, index)
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


def _perplexity_columns(data: str, index: int) -> list[Column]:
    def ratio(row: Row) -> Number:
        return None if row.perplexity_changes is None else row.perplexity_changes[index].ratio

    def show_ratio(row: Row) -> str:
        change = None if row.perplexity_changes is None else row.perplexity_changes[index]
        if change is None or change.ratio is None:
            return ""
        interval = change.ratio_interval
        return f"× {change.ratio:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")

    return [
        plain(f"perplexity {data}", lambda row: row.evaluation.perplexity[index].value, "{:.2f}"),
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
    """A share, or a difference of shares, in per cent with its interval."""
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
