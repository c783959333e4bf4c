"""Train: fine-tune what a step before left, so that its zeros stay."""

from __future__ import annotations

from coprune.base.errors import BadInput
from coprune.base.validation import read_as
from coprune.base.words import Set
from coprune.evaluation.answers.questions import plan_of, questions_for
from coprune.model.checkpoint.locate import holds_model, locate
from coprune.model.loaded_model import Loaded, open_model
from coprune.recipe.recipe import Recipe
from coprune.recipe.train import has_adapters, has_teacher
from coprune.run.context import Run
from coprune.training.footprint import require_room_to_train
from coprune.training.report import REPORT_FILE, FinetuneReport


def train(run: Run) -> FinetuneReport:
    """Fine-tune a model. Raises as `coprune.finetune`."""
    from coprune.training.run import run_finetuning  # needs an extra, and takes seconds to import

    if run.first:
        with run.taking():
            pass  # all that can be was checked before the model was made
    report = run_finetuning(run.recipe, run.reporter, after_pruning=True)
    for line in str(report).splitlines():
        run.reporter.say(line)
    return report


def finished_training(recipe: Recipe) -> FinetuneReport | None:
    """Return the report of a finished training in a recipe's folder, if its model is there."""
    try:
        report = read_as(FinetuneReport, recipe.training_folder / REPORT_FILE)
    except BadInput:
        return None
    return report if report.saved_model is None or holds_model(report.saved_model) else None


def check_training(recipe: Recipe, loaded: Loaded | None) -> None:
    """Check how a model is trained that is to be made before.

    Args:
        recipe: of all that is asked for.
        loaded: the model where it was handed over, so that its name need not lead to files.

    Raises:
        BadInput: there is no teacher, the training could never fit, or the model cannot be asked: its chat template fails.
    """
    if loaded is None:
        _require_room(recipe)
    elif has_teacher(recipe.train.mode):
        _require_teacher(recipe)
    plan = plan_of(recipe.evaluate.answers, saves=True)
    if plan is not None and plan.is_asked:
        asked = loaded or open_model(recipe.model, stream=True)
        if asked.tokenizer is not None:
            questions_for(plan, asked.tokenizer, asked.model)


def _require_teacher(recipe: Recipe) -> None:
    """Refuse a distillation from a model that is in memory alone, where pruning changes it."""
    try:
        locate(recipe.model.name, recipe.model.cache_dir)
    except BadInput:
        raise BadInput(
            f"distillation loads the dense model again, but {recipe.model.name} is only in memory",
            field="finetune",
            value=recipe.train.mode,
            fix=("name the model's folder, or use ", Set("finetune", "dense")),
        ) from None


def _require_room(recipe: Recipe) -> None:
    """Refuse a training that could never fit, before anything is pruned; of what parts are removed from, less is trained."""
    from coprune.training.session import require_trainable
    from coprune.training.trainer import training_device

    where = locate(recipe.model.name, recipe.model.cache_dir)
    try:
        require_trainable(where, recipe.train.mode)
    except BadInput as error:
        raise error.renamed({"mode": "finetune"}) from None
    if has_adapters(recipe.train.mode) or recipe.remove.parts or not recipe.model.check_memory:
        return
    distills = has_teacher(recipe.train.mode)
    require_room_to_train(where, recipe.train.scope, distills, training_device(recipe.model.device))
