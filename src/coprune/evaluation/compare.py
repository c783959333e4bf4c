"""Several models measured alike and put side by side; the first is the baseline that the others are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.base.words import say
from coprune.evaluation.cache import EvaluationCache
from coprune.evaluation.changes import row
from coprune.evaluation.closeness import OtherTokens
from coprune.evaluation.comparison import Comparison
from coprune.evaluation.extras import Extras, measures_anything, nothing_to_measure
from coprune.evaluation.measure import Subject
from coprune.evaluation.measurement import Closeness
from coprune.recipe.recipe import Recipe


def compare_models(
    models: Sequence[str],
    recipe: Recipe,
    reporter: Reporter,
    cache: EvaluationCache,
    model_of: Callable[[str], str] = str,
) -> Comparison:
    """Measure every model as the recipe says (its own model is not looked at) and compare each with the first.

    models: as they were asked for; model_of: the folder, GGUF file or Hub id that such a name stands for. What the cache
    holds is not measured again. Raises BadInput if there are fewer than two, one cannot be found, or they do not compare.
    """
    if len(models) < 2:
        few = "a comparison needs two models or more, of which the first is the baseline"
        raise BadInput(few, field="models", value=models, fix="name another one after it")
    if not measures_anything(recipe):
        raise nothing_to_measure()
    found = [recipe.replaced(model=model_of(name)) for name in models]
    tasks = Extras.prepare(recipe).tasks
    subjects = [Subject(one, cache, reporter, tasks) for one in found]
    require_one_task(subjects)
    for subject, label in zip(subjects, labels_of([one.name for one in subjects]), strict=True):
        subject.label = label
    for subject in subjects[1:]:
        subject.begin_as(subjects[0])
    # The others are held against it, and it against nothing.
    baseline = subjects[0].measure().model_copy(update={"required": ()})
    rows = [row(models[0], baseline, None)]
    for name, subject in zip(models[1:], subjects[1:], strict=True):
        closeness = _closeness(subject, subjects[0], reporter)
        evaluation = subject.measure().model_copy(update={"against": subjects[0].name, "closeness": closeness})
        rows.append(row(name, evaluation, baseline))
        subject.release()
    return Comparison(rows=tuple(rows))


def _closeness(subject: Subject, baseline: Subject, reporter: Reporter) -> tuple[Closeness, ...]:
    """How close a model is to the baseline: nothing of classifiers, and of models with other tokens, measured by themselves."""
    if subject.classifies:
        return ()
    try:
        return subject.closeness_to(baseline)
    except BadInput as error:
        # Of other tokens the one may be missing by which the baseline's windows begin.
        if not isinstance(error, OtherTokens) and error.field != "bos":
            raise
        reporter.say(f"No closeness: {say(error.cause)}.")
        subject.begin_as(None)
        return ()


def labels_of(names: Sequence[str]) -> list[str]:
    """Names of folders for the models' items: the last parts of paths and Hub ids, or all of them where those are alike."""
    last = [Path(name).name for name in names]
    return [
        short if last.count(short) == 1 else "__".join(part for part in Path(name).parts if part != "/")
        for name, short in zip(names, last, strict=True)
    ]


def require_one_task(subjects: Sequence[Subject]) -> None:
    """Raise BadInput if some of the models classify images and others do not."""
    for subject in subjects[1:]:
        if subject.classifies != subjects[0].classifies:
            one, other = (subject, subjects[0]) if subject.classifies else (subjects[0], subject)
            raise BadInput(f"{one.name} classifies images and {other.name} does not, so they do not compare")
