"""Compare models from Python: `coprune.compare`. Runs and sweeps stand for the models that they saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import require_usable
from coprune.base.progress import Reporter
from coprune.base.words import Command, Set, say
from coprune.data.in_memory import TextData, handed_over
from coprune.data.keyword_arguments import MeasureArguments
from coprune.evaluation.changes import row
from coprune.evaluation.closeness import OtherTokens
from coprune.evaluation.comparison_table import Comparison
from coprune.evaluation.extra_measurements import Extras, measures_anything, nothing_to_measure
from coprune.evaluation.measured_model import Subject, held_against, require_one_task
from coprune.evaluation.measurement import Closeness
from coprune.recipe.recipe import Recipe
from coprune.recipe.views import measuring_recipe
from coprune.report.run_folder import model_of
from coprune.store.store import Store
from coprune.sweeps.finished import models_to_compare


def compare(
    models: Sequence[str | Path],
    data: TextData | None = None,
    *,
    evaluation_cache: str | Path | None = None,
    fresh: bool = False,
    quiet: bool = False,
    **settings: Unpack[MeasureArguments],
) -> Comparison:
    """Compare models: size, sparsity, perplexity or accuracy, closeness to the first, and tasks.

    Args:
        models: two or more Hub ids, folders, GGUF files, or folders of runs and sweeps that saved models;
            the first is the baseline.
        data: texts or images to measure on, as in `coprune.evaluate`.
        evaluation_cache: folder in which evaluations are cached; by default `~/.cache/coprune/store`.
        fresh: ignore the cache: measure everything again, and store nothing.
        quiet: show no progress bars and messages on standard error.
        settings: as in `coprune.evaluate`.

    Returns:
        A row per model with its differences from the baseline; write it with `to_csv` or `to_markdown`.

    Raises:
        BadInput: the request cannot be fulfilled, or the models cannot be compared.
        NumericalError: a model's output is NaN.
    """
    named = [name for model in _names(models) for name in models_to_compare(model)]
    store = Store(None) if fresh else _store(evaluation_cache)
    reporter = Reporter(quiet)
    with handed_over({"data": data, **settings}, None, "data") as asked, reporter.libraries():
        recipe = measuring_recipe(named[0] if named else "-", asked)
        return compare_models(named, recipe, reporter, store, model_of)


def _store(evaluations: str | Path | None) -> Store:
    """Return the store of evaluations. Raises BadInput if its folder is a file or not writable."""
    if evaluations is None:
        return Store.of_user()
    folder = expand_home(evaluations)
    if folder.is_file():
        raise BadInput(f"{folder} is a file", field="evaluation_cache", value=evaluations, fix="name a folder")
    if not folder.exists():
        require_usable(folder, "evaluation_cache")
    return Store(folder)


def _names(models: Sequence[str | Path]) -> list[str]:
    """Return names of models. Raises BadInput for a single name, and for a model in memory, which cannot be cached."""
    if isinstance(models, str | Path):
        raise BadInput(
            "models are compared with each other", field="models", value=models, fix="give a list of two or more"
        )
    for model in models:
        if not isinstance(model, str | Path):
            held = f"models are compared by name, and a {type(model).__name__} is in memory"
            raise BadInput(
                held, field="models", fix=("save it, or type ", Command("evaluate", "MODEL", Set("against", ...)))
            )
    return list(map(str, models))


def compare_models(
    models: Sequence[str],
    recipe: Recipe,
    reporter: Reporter,
    store: Store,
    model_of: Callable[[str], str] = str,
) -> Comparison:
    """Measure every model and compare each with the first.

    Args:
        models: names of the models, as given by the user.
        recipe: what to measure; its own model is ignored.
        reporter: receives progress.
        store: cache of measurements.
        model_of: returns the folder, GGUF file or Hub id that a name stands for.

    Returns:
        A row per model.

    Raises:
        BadInput: there are fewer than two models, one cannot be found, or they cannot be compared.
    """
    if len(models) < 2:
        few = "a comparison needs two models or more, of which the first is the baseline"
        raise BadInput(few, field="models", value=models, fix="name another one after it")
    if not measures_anything(recipe):
        raise nothing_to_measure()
    found = [recipe.replaced(model=model_of(name)) for name in models]
    tasks = Extras.prepare(recipe).tasks
    subjects = [Subject(one, store, reporter, tasks) for one in found]
    require_one_task(subjects)
    for subject, label in zip(subjects, labels_of([one.name for one in subjects]), strict=True):
        subject.label = label
    for subject in subjects[1:]:
        subject.begin_as(subjects[0])
    # The baseline itself is not compared.
    baseline = subjects[0].measure().model_copy(update={"required": ()})
    rows = [row(models[0], baseline, None)]
    for name, subject in zip(models[1:], subjects[1:], strict=True):
        closeness = _closeness(subject, subjects[0], reporter)
        evaluation = held_against(subject.measure(), subject, subjects[0], baseline)
        evaluation = evaluation.model_copy(update={"closeness": closeness})
        rows.append(row(name, evaluation, baseline))
        subject.release()
    return Comparison(rows=tuple(rows))


def _closeness(subject: Subject, baseline: Subject, reporter: Reporter) -> tuple[Closeness, ...]:
    """Measure the closeness of a model to the baseline if both are text models with the same tokens."""
    if subject.task != "text":
        return ()
    try:
        return subject.closeness_to(baseline)
    except BadInput as error:
        # A model with other tokens may lack the token that begins the baseline's windows.
        if not isinstance(error, OtherTokens) and error.field != "bos":
            raise
        reporter.say(f"No closeness: {say(error.cause)}.")
        subject.begin_as(None)
        return ()


def labels_of(names: Sequence[str]) -> list[str]:
    """Return folder names for the models' items: the last part of each path or Hub id, or all parts if that is ambiguous."""
    last = [Path(name).name for name in names]
    return [
        short if last.count(short) == 1 else "__".join(part for part in Path(name).parts if part != "/")
        for name, short in zip(names, last, strict=True)
    ]
