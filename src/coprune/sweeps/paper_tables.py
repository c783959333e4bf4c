"""The papers' tables, one per model and measure: methods as rows, patterns as columns, mean and deviation over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from coprune.base.words import Cell, Sheet
from coprune.evaluation.zero_shot import Estimate, ZeroShotFacts, is_share, main_of
from coprune.recipe.flat import PRESET
from coprune.recipe.pattern import parse_pattern
from coprune.report.figures import AccuracyFacts, PerplexityFacts
from coprune.report.schema import Report
from coprune.sweeps.expand import Run, folder_part, varied
from coprune.sweeps.file import Sweep

# Fields shown by rows, columns and repetitions; all others that differ between runs are added to the row's label.
_PLACED = ("model", "method", PRESET, "pattern", "sparsity", "seed", "save", "save_model")


@dataclass(frozen=True)
class Measure:
    """A measure by which runs are compared. less: whether lower is better."""

    title: str
    values: dict[str, float]
    """Values by run."""
    dense: float | None
    less: bool
    form: str
    errors: Mapping[str, float | None] = field(default_factory=dict)
    """Standard errors over the items of one run, by run."""
    dense_error: float | None = None


@dataclass(frozen=True)
class Result:
    """Result of one method with one pattern over all seeds. mean: None if no run is finished."""

    text: str
    mean: float | None
    best: bool = False


@dataclass(frozen=True)
class PaperTable:
    """A table whose rows are methods, the dense model first, with one cell per column."""

    title: str
    columns: list[str]
    rows: dict[str, list[Result]]

    def sheet(self) -> Sheet:
        """Return the table for display, with the best value of every column emphasised."""
        rows = [[Cell(name), *(Cell(one.text, strong=one.best) for one in found)] for name, found in self.rows.items()]
        return Sheet("", rows, ["method", *self.columns])

    def markdown(self) -> str:
        """Return the title and the table as Markdown."""
        return f"{self.title}\n\n{self.sheet().markdown()}\n"


def perplexity_of(report: Report, facts: PerplexityFacts) -> float:
    """Return the perplexity of a run's final model on a text."""
    tuned = report.finetuned
    return facts.pruned if tuned is None else tuned.perplexity.get(facts.data, facts.pruned)


def top1_of(report: Report, facts: AccuracyFacts) -> float:
    """Return the accuracy of a run's final model on images."""
    tuned = report.finetuned
    return facts.pruned_top1 if tuned is None else tuned.top1.get(facts.data, facts.pruned_top1)


def tasks_of(report: Report) -> ZeroShotFacts | None:
    """Return the task scores of a run's final model; None if only the model before training was measured."""
    return report.zero_shot if report.finetuned is None else None


def paper_tables(sweep: Sweep, runs: Sequence[Run], reports: Mapping[str, Report]) -> list[PaperTable]:
    """Build the tables of a sweep's finished runs, with a column per pattern (and ratio, if unstructured)."""
    beside = [name for name in varied(sweep) if name not in _PLACED]
    tables = []
    for model in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == model]
        for measure in _measures(own, reports):
            tables.append(_table(model, own, measure, beside))
    return tables


def _table(model: str, runs: Sequence[Run], measure: Measure, beside: Sequence[str]) -> PaperTable:
    columns = list(dict.fromkeys(_column(run) for run in runs))
    names = dict.fromkeys(_row(run, beside) for run in runs)
    rows = {name: [_cell(runs, measure, name, column, beside) for column in columns] for name in names}
    for index in range(len(columns)):
        means = [cells[index].mean for cells in rows.values()]
        known = [mean for mean in means if mean is not None]
        if len(known) < 2:
            continue
        best = min(known) if measure.less else max(known)
        for cells in rows.values():
            cells[index] = Result(cells[index].text, cells[index].mean, cells[index].mean == best)
    if measure.dense is not None:
        dense = Result(_with_error(measure.dense, measure.dense_error, measure.form), measure.dense)
        rows = {"dense": [dense] * len(columns), **rows}
    return PaperTable(f"{model}: {measure.title}", columns, rows)


def _column(run: Run) -> str:
    recipe = run.recipe
    return parse_pattern(recipe.prune.pattern).label(f"{100 * recipe.prune.ratio:g} %")


def _row(run: Run, beside: Sequence[str]) -> str:
    others = [f"{name} {folder_part(name, run.setting(name), bare=True)}" for name in beside]
    return ", ".join([run.way, *others])


def _cell(runs: Sequence[Run], measure: Measure, row: str, column: str, beside: Sequence[str]) -> Result:
    meant = [run.name for run in runs if _row(run, beside) == row and _column(run) == column]
    found = [measure.values[name] for name in meant if name in measure.values]
    if not found:
        return Result("–", None)
    mean = statistics.fmean(found)
    several = len(found) > 1 and all(map(math.isfinite, found))
    own = next((measure.errors.get(name) for name in meant if name in measure.values), None)
    text = _with_error(mean, statistics.stdev(found) if several else own if len(found) == 1 else None, measure.form)
    if len(found) < len(meant):
        text += f" ({len(found)} of {len(meant)})"
    return Result(text, mean)


def _with_error(value: float, error: float | None, form: str) -> str:
    return _number(value, form) if error is None else f"{_number(value, form)} ± {_number(error, form)}"


def _number(value: float, form: str) -> str:
    return f"{value:{form}}".replace("%", " %") if math.isfinite(value) else "∞"


def _measures(runs: Sequence[Run], reports: Mapping[str, Report]) -> Iterator[Measure]:
    """Yield every measure with results: perplexity per text, accuracy per set of images, each task, and the tasks' mean."""
    found = {run.name: reports[run.name] for run in runs if run.name in reports}
    texts = {(facts.data, facts.seqlen): None for report in found.values() for facts in report.perplexity}
    for data, seqlen in texts:
        facts = {n: f for n, r in found.items() for f in r.perplexity if (f.data, f.seqlen) == (data, seqlen)}
        dense = next((one.dense for one in facts.values() if one.dense is not None), None)
        pruned = {name: perplexity_of(found[name], one) for name, one in facts.items()}
        yield Measure(f"perplexity on {data}, sequence length {seqlen}", pruned, dense, True, ".2f")
    for data in dict.fromkeys(facts.data for report in found.values() for facts in report.accuracy):
        images = {name: f for name, report in found.items() for f in report.accuracy if f.data == data}
        before = next((one.dense_top1 for one in images.values() if one.dense_top1 is not None), None)
        top1 = {name: top1_of(found[name], one) for name, one in images.items()}
        yield Measure(f"top-1 accuracy on {data}", top1, before, False, ".2%")
    tasks = {name: own for name, report in found.items() if (own := tasks_of(report)) is not None}
    names = dict.fromkeys(task.task for facts in tasks.values() for task in facts.tasks)
    for name in names if len(names) > 1 else ():
        one = {run: task for run, facts in tasks.items() for task in facts.tasks if task.task == name}
        metric = main_of(next(iter(one.values())).pruned)
        dense_score = next((task.dense[metric] for task in one.values() if task.dense and metric in task.dense), None)
        scores = {run: task.pruned[metric] for run, task in one.items() if metric in task.pruned}
        title = f"{_METRICS.get(metric, metric)} on {name}"
        less = "perplexity" in metric or metric in ("bits_per_byte", "ter")
        yield _estimated(title, scores, dense_score, less, ".2%" if is_share(metric) else ".2f")
    means = {run: facts.mean_pruned for run, facts in tasks.items() if facts.mean_pruned is not None}
    if means:
        of_dense = next((facts.mean_dense for facts in tasks.values() if facts.mean_dense is not None), None)
        title = "mean accuracy over the tasks" if len(names) > 1 else f"accuracy on {next(iter(names))}"
        yield _estimated(title, means, of_dense, False, ".2%")


_METRICS = {"acc": "accuracy", "acc_norm": "normalised accuracy"}


def _estimated(title: str, found: Mapping[str, Estimate], dense: Estimate | None, less: bool, form: str) -> Measure:
    """Return estimates with their standard errors as a measure."""
    values, errors = {run: one.value for run, one in found.items()}, {run: one.stderr for run, one in found.items()}
    before = (None, None) if dense is None else (dense.value, dense.stderr)
    return Measure(title, values, before[0], less, form, errors, before[1])


SPREAD = "± is the standard deviation over seeds; for a task with one seed, the standard error over its items."
"""Explanation of ± in these tables."""
