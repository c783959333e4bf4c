"""`coprune eval`: perplexity, zero-shot tasks and closeness to another model, of any model that can be loaded."""

from __future__ import annotations

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.base.words import Setting
from coprune.evaluation.cache import EvaluationCache
from coprune.evaluation.evaluation import AccuracyResult, Evaluation, PerplexityResult
from coprune.evaluation.extras import Extras, nothing_to_measure
from coprune.evaluation.measure import Subject
from coprune.evaluation.zero_shot import Estimate
from coprune.recipe.recipe import Recipe


def evaluate_model(recipe: Recipe, reporter: Reporter, against: str | None = None) -> Evaluation:
    """Measure what the recipe asks for: perplexity on every text of its eval_data, and its tasks.

    against: a model to compare next-token distributions with, on the same texts. Raises BadInput.
    """
    if not recipe.evaluation.data and not recipe.evaluation.runs_tasks:
        raise nothing_to_measure()
    if against is not None and not recipe.evaluation.data:
        raise BadInput(
            "closeness to another model is measured on text",
            field="against",
            value=against,
            fix=("name a text with ", Setting("data")),
        )
    tasks = Extras.prepare(recipe).tasks
    cache = EvaluationCache(None)
    dense = None if against is None else Subject(recipe.replaced(model=against), cache, reporter, None)
    subject = Subject(recipe, cache, reporter, tasks)
    found = subject.measure()
    if dense is None:
        return found
    return found.model_copy(update={"against": dense.name, "closeness": subject.closeness_to(dense)})


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """What was measured, one line each."""
    lines = [_perplexity_line(result) for result in evaluation.perplexity]
    lines += [_accuracy_line(result) for result in evaluation.accuracy]
    for near in evaluation.closeness:
        low, high = near.kl_interval or (near.kl, near.kl)
        lines.append(
            f"closeness  KL {near.kl:.4f} [{low:.4f}, {high:.4f}] nats, top-1 agreement {near.top1_agreement:.2%} "
            f"with {evaluation.against} on {near.data}"
        )
    if evaluation.zero_shot is None:
        return lines
    for task in evaluation.zero_shot.tasks:
        metrics = ", ".join(f"{name} {percent(estimate)}" for name, estimate in task.metrics.items())
        lines.append(f"{task.task}  {metrics} ({task.items} items, {task.num_fewshot}-shot, version {task.version})")
    mean = evaluation.zero_shot.mean
    if mean is not None:
        lines.append(f"mean of acc over {len(evaluation.zero_shot.tasks)} tasks  {percent(mean)}")
    return lines


def percent(estimate: Estimate) -> str:
    """An estimate in per cent with its standard error."""
    error = "" if estimate.stderr is None else f" ± {100 * estimate.stderr:.2f}"
    return f"{100 * estimate.value:.2f}{error} %"


def _accuracy_line(found: AccuracyResult) -> str:
    (low, high), (low5, high5) = found.top1_interval, found.top5_interval
    return (
        f"accuracy  top-1 {found.top1:.2%} [{low:.2%}, {high:.2%}], top-5 {found.top5:.2%} [{low5:.2%}, {high5:.2%}] "
        f"on {found.data} ({found.images} images)"
    )


def _perplexity_line(found: PerplexityResult) -> str:
    low, high = found.interval or (found.value, found.value)
    per_byte = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits per byte"
    return (
        f"perplexity {found.value:.4f} [{low:.2f}, {high:.2f}]{per_byte} on {found.data} "
        f"({found.windows} windows, sequence length {found.seqlen})"
    )
