"""Results of zero-shot (or few-shot) tasks: metrics per task, the papers' mean, and paired differences.

Items, prompts and metrics are those of the EleutherAI harness (see `harness`). Two models are compared on the same items, so
the standard error of a mean difference excludes the items' difficulty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from coprune.base.errors import BadInput

# The seven tasks of the Wanda paper (arXiv 2306.11695), whose tables show `acc`, not `acc_norm`, and its mean.
PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
MAIN_METRIC = "acc"
_NO_SHARES = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "bleu", "chrf", "ter"}


@dataclass(frozen=True)
class ZeroShotSettings:
    """Settings of zero-shot tasks."""

    tasks: tuple[str, ...] = PAPER_TASKS
    """Names of tasks, tags or groups of the harness, or paths of task definitions."""
    num_fewshot: int = 0
    include_path: Path | None = None
    """Folder with more task definitions, which override the harness's of the same name."""
    limit: int | None = None
    """Maximum number of items per task, the first ones."""
    batch_size: int | None = None
    chat_template: bool = False
    """Whether prompts use the tokenizer's chat template."""
    gen_kwargs: str | None = None
    """Settings of generative tasks, overriding their own: `max_gen_toks=64,temperature=0.7`."""
    log_samples: Path | None = None
    """Folder for every item with the model's answer, a .jsonl file per task."""
    trusted: bool = False
    """Whether definitions that are not part of lm-eval may run code."""

    def logging_as(self, model: str) -> ZeroShotSettings:
        """Return the settings for one of several models, whose items go to a separate folder."""
        return self if self.log_samples is None else replace(self, log_samples=self.log_samples / model)


class Estimate(BaseModel):
    """A mean with its standard error (None for a single item, or if the harness gives none)."""

    model_config = ConfigDict(frozen=True)

    value: float
    stderr: float | None


def is_share(metric: str) -> bool:
    """Return whether a metric lies between 0 and 1 and is shown in per cent, unlike perplexity and BLEU."""
    return metric not in _NO_SHARES


def shown(metric: str, found: Estimate | None, sign: str = "") -> str:
    """Return an estimate with its standard error: shares in per cent, other metrics (perplexity, BLEU) as numbers.

    found: None is shown as a dash; sign: `+` for a difference.
    """
    if found is None:
        return "–"
    scale, unit = (100, " %") if is_share(metric) else (1, "")
    error = "" if found.stderr is None else f" ± {scale * found.stderr:.2f}"
    return f"{scale * found.value:{sign}.2f}{error}{unit}"


def main_of(metrics: Mapping[str, Estimate]) -> str:
    """Return the main metric of a task: `acc`, or else the first."""
    return MAIN_METRIC if MAIN_METRIC in metrics else next(iter(metrics))


def _side_by_side(metric: str, dense: Estimate | None, pruned: Estimate | None, delta: Estimate | None) -> list[str]:
    """Return both models' figures and their difference as text."""
    return [shown(metric, dense), shown(metric, pruned), shown(metric, delta, "+")]


class TaskScores(BaseModel):
    """One model's scores on one task."""

    model_config = ConfigDict(frozen=True)

    task: str
    version: float | str | None
    num_fewshot: int
    items: int
    fingerprint: str
    """Hash of items and prompts: only scores on the same items can be paired."""
    metrics: dict[str, Estimate]
    scores: dict[str, tuple[float, ...]]
    """Scores of all items in order, by metric."""

    @property
    def main_metric(self) -> str:
        """The task's main metric."""
        return main_of(self.metrics)


class ZeroShot(BaseModel):
    """One model's scores on several tasks."""

    model_config = ConfigDict(frozen=True)

    tasks: tuple[TaskScores, ...]
    groups: dict[str, dict[str, Estimate]] = {}
    """The harness's own scores over the tasks of a group."""
    harness: str
    """The version of lm-eval."""

    @property
    def mean(self) -> Estimate | None:
        """The unweighted mean of the tasks' acc, as in the papers' tables; None if a task has no acc."""
        if not all(MAIN_METRIC in scores.metrics for scores in self.tasks):
            return None
        return mean_of([scores.metrics[MAIN_METRIC] for scores in self.tasks])


class TaskComparison(BaseModel):
    """A task's metrics for the dense and the pruned model, and their paired difference."""

    model_config = ConfigDict(frozen=True)

    task: str
    version: float | str | None
    num_fewshot: int
    items: int
    dense: dict[str, Estimate] | None
    pruned: dict[str, Estimate]
    delta: dict[str, Estimate] | None
    """Pruned minus dense, with the standard error of the mean of the items' differences."""

    def side_by_side(self, metric: str) -> list[str]:
        """Return a metric of the dense and the pruned model and the difference as text."""
        dense, delta = ({} if known is None else known for known in (self.dense, self.delta))
        return _side_by_side(metric, dense.get(metric), self.pruned[metric], delta.get(metric))


class ZeroShotFacts(BaseModel):
    """Zero-shot results of a run."""

    model_config = ConfigDict(frozen=True)

    tasks: tuple[TaskComparison, ...]
    mean_dense: Estimate | None
    mean_pruned: Estimate | None
    mean_delta: Estimate | None
    harness: str

    def means_side_by_side(self) -> list[str]:
        """Return the means of both models and their difference as text."""
        return _side_by_side(MAIN_METRIC, self.mean_dense, self.mean_pruned, self.mean_delta)


def compare_zero_shot(dense: ZeroShot | None, pruned: ZeroShot) -> ZeroShotFacts:
    """Compare two models' results. Raises BadInput if tasks or items differ."""
    before = {} if dense is None else {scores.task: scores for scores in dense.tasks}
    if dense is not None and set(before) != {scores.task for scores in pruned.tasks}:
        raise BadInput("the two models were evaluated on different tasks, so their results cannot be compared")
    tasks = tuple(
        TaskComparison(
            task=scores.task,
            version=scores.version,
            num_fewshot=scores.num_fewshot,
            items=scores.items,
            dense=None if dense is None else before[scores.task].metrics,
            pruned=scores.metrics,
            delta=None if dense is None else paired_difference(before[scores.task], scores),
        )
        for scores in pruned.tasks
    )
    deltas = [task.delta[MAIN_METRIC] for task in tasks if task.delta is not None and MAIN_METRIC in task.delta]
    return ZeroShotFacts(
        tasks=tasks,
        mean_dense=None if dense is None else dense.mean,
        mean_pruned=pruned.mean,
        mean_delta=mean_of(deltas) if len(deltas) == len(tasks) else None,
        harness=pruned.harness,
    )


def paired_difference(dense: TaskScores, pruned: TaskScores) -> dict[str, Estimate]:
    """Return mean and standard error of the items' differences, pruned minus dense, for metrics with item scores.

    Raises BadInput if items or prompts differ.
    """
    if dense.fingerprint != pruned.fingerprint:
        raise BadInput(f"the two models answered different items of {pruned.task}, so they cannot be paired")
    return {
        metric: mean_and_error([after - before for before, after in zip(dense.scores[metric], scores, strict=True)])
        for metric, scores in pruned.scores.items()
        if metric in dense.scores
    }


def mean_and_error(values: Sequence[float]) -> Estimate:
    """Return the mean of N values and its standard error, s / √N with N − 1 degrees of freedom; None for one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(value=mean, stderr=None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(value=mean, stderr=math.sqrt(variance / count))


def mean_of(estimates: Sequence[Estimate]) -> Estimate | None:
    """Return the unweighted mean of independent estimates; None for none."""
    if not estimates:
        return None
    errors = [estimate.stderr for estimate in estimates]
    known = [error for error in errors if error is not None]
    total = math.sqrt(math.fsum(error**2 for error in known)) / len(estimates)
    return Estimate(
        value=math.fsum(estimate.value for estimate in estimates) / len(estimates),
        stderr=total if len(known) == len(errors) else None,
    )
