"""Models compared that may be named by the runs and sweeps that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.output_names import require_usable
from coprune.base.progress import Reporter
from coprune.base.words import Command, Set
from coprune.data.given import TextData, handed_over
from coprune.evaluation.arguments import MeasureArguments
from coprune.evaluation.cache import EvaluationCache, default_cache_folder
from coprune.evaluation.compare import compare_models
from coprune.evaluation.comparison import Comparison
from coprune.recipe.measuring import measuring_recipe
from coprune.report.folder import model_of
from coprune.run.sweep.finished import models_to_compare


def compare(
    models: Sequence[str | Path],
    data: TextData | None = None,
    *,
    evaluations: str | Path | None = None,
    fresh: bool = False,
    quiet: bool = False,
    **settings: Unpack[MeasureArguments],
) -> Comparison:
    """Compare models: size, sparsity, perplexity or accuracy, closeness to the first, and tasks.

    Args:
        models: two or more Hub ids, folders (packed or not), GGUF files, or folders of runs and sweeps that saved models;
            the first is the baseline.
        data: texts or images to measure on, as in `coprune.evaluate`.
        evaluations: the folder where evaluations are kept, so that nothing is measured twice; without it,
            `~/.cache/coprune/evaluations`.
        fresh: measure everything again, and keep nothing.
        quiet: no progress bars and lines on standard error.
        settings: as in `coprune.evaluate`.

    Returns:
        A row per model, with what differs from the baseline; `to_csv` and `to_markdown` write it.

    Raises:
        BadInput: for what cannot be done as asked, or models that do not compare.
        NumericalError: a model's output is NaN.
    """
    named = [name for model in _names(models) for name in models_to_compare(model)]
    cache = EvaluationCache(None if fresh else _folder(evaluations))
    reporter = Reporter(quiet)
    with handed_over({"data": data, **settings}, None, "data") as asked, reporter.libraries():
        recipe = measuring_recipe(named[0] if named else "-", asked)
        return compare_models(named, recipe, reporter, cache, model_of)


def _folder(evaluations: str | Path | None) -> Path:
    """Where evaluations are kept. Raises BadInput for a file, and where nobody may write."""
    if evaluations is None:
        return default_cache_folder()
    folder = expand_home(evaluations)
    if folder.is_file():
        raise BadInput(f"{folder} is a file", field="evaluations", value=evaluations, fix="name a folder")
    if not folder.exists():
        require_usable(folder, "evaluations")
    return folder


def _names(models: Sequence[str | Path]) -> list[str]:
    """Names of models. Raises BadInput for a single one, and for a model in memory, of which nothing can be kept."""
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
