"""Zero-shot tasks on a run's page: a bar for both models on every task, and the table."""

from __future__ import annotations

from collections.abc import Mapping

from coprune.base.shown import per_cent
from coprune.evaluation.zero_shot import Estimate, TaskComparison, ZeroShotFacts, is_share, main_of
from coprune.report.bars import Bar, bars
from coprune.report.html import card, from_to, section, table

_REACH = 1.96  # standard errors to either end of a 95 % interval


def zero_shot_card(facts: ZeroShotFacts | None) -> str:
    """The headline figure; nothing without a mean."""
    if facts is None or facts.mean_pruned is None:
        return ""
    before = [] if facts.mean_dense is None else [f"{100 * facts.mean_dense.value:.2f}"]
    return card(
        "mean accuracy", from_to([*before, per_cent(facts.mean_pruned.value)]), f"over {len(facts.tasks)} tasks"
    )


def zero_shot_section(facts: ZeroShotFacts) -> str:
    """Bars and a table of all tasks."""
    rows = [_row(task, metric) for task in facts.tasks for metric in task.pruned]
    if facts.mean_pruned is not None:
        rows.append(["mean", "acc", *facts.means_side_by_side(), "", ""])
    shots = {task.num_fewshot for task in facts.tasks}
    note = (
        f"lm-eval {facts.harness}, {', '.join(map(str, sorted(shots)))} examples before each question. Bars show 95 % "
        "intervals; the difference has the standard error over the same items."
    )
    header = ["task", "metric", "dense", "pruned", "difference", "items", "version"]
    charted = bars([(task.task, _bars(task)) for task in facts.tasks if is_share(main_of(task.pruned))], top=1.0)
    return section("Zero-shot tasks", charted, table(header, rows), note=note)


def _row(task: TaskComparison, metric: str) -> list[str]:
    return [task.task, metric, *task.side_by_side(metric), str(task.items), str(task.version)]


def _bars(task: TaskComparison) -> list[Bar]:
    shown = []
    for kind, metrics in (("dense", task.dense), ("pruned", task.pruned)):
        if metrics is not None:
            shown.append(task_bar(kind, kind, metrics))
    return shown


def task_bar(name: str, kind: str, metrics: Mapping[str, Estimate]) -> Bar:
    """The bar of what a model reached in a task, by its main metric, with a 95 % interval."""
    found = metrics[main_of(metrics)]
    reach = _REACH * (found.stderr or 0.0)
    return Bar(name, kind, found.value, per_cent(found.value), (found.value - reach, found.value + reach))
