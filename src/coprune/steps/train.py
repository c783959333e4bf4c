"""Training: fine-tune the model of an earlier step while its zeros stay zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from coprune.base.errors import BadInput
from coprune.base.validation import read_as
from coprune.base.words import Set
from coprune.data.mixture import reads_conversations
from coprune.evaluation.answers.questions import plan_of, questions_for
from coprune.model.blocks import Block
from coprune.model.checkpoint.locate import holds_model, locate
from coprune.model.loaded_model import Loaded, open_model
from coprune.model.matrix_choice import Chosen
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.recipe.sources import split_sources
from coprune.recipe.train_part import has_adapters, has_teacher
from coprune.recipe.tree import LEAVES
from coprune.report.schema import Report
from coprune.run.context import Run
from coprune.run.step import Left
from coprune.steps.joined import report_with_training
from coprune.steps.recipe_step import StepOfRecipe
from coprune.training.finetune_report import REPORT_FILE, FinetuneReport
from coprune.training.footprint import require_room_to_train


class Train(StepOfRecipe):
    """Fine-tunes what the step before left."""

    name = "train"
    always_saves = True

    @classmethod
    def is_asked(cls, recipe: Recipe) -> bool:
        return recipe.train.mode is not None

    @classmethod
    def part_of(cls, recipe: Recipe) -> Recipe:
        return training_of(recipe)

    @classmethod
    def told(cls, recipe: Recipe, chosen: Chosen, blocks: Sequence[Block]) -> str:
        asked = recipe.train
        limits = {"minutes": asked.minutes, "tokens": asked.tokens, "steps": asked.max_steps}
        far = next((f"{value:,} {unit}" for unit, value in limits.items() if value), f"{asked.epochs:g} epochs")
        return f"{asked.mode}, {far}"

    def joined(self, recipe: Recipe, before: Report, own: BaseModel) -> Report:
        assert isinstance(own, FinetuneReport)
        return report_with_training(recipe, before, own)

    def check(self) -> None:
        check_training(self.whole.recipe, self.whole.given.loaded)

    def finished(self, before: Left | None) -> Left | None:
        trained = finished_training(self._as_run(before).recipe)
        return None if trained is None else Left(trained, trained.saved_model)

    def found_before(self, report: Report) -> dict[str, Any]:
        found = super().found_before(report)
        if report.perplexity and report.model.task in ("text", "masked"):
            found["finetune_eval_seqlen"] = report.perplexity[0].seqlen
        return found

    def do(self, run: Run) -> Left:
        trained = train(run)
        return Left(trained, trained.saved_model)


def training_of(recipe: Recipe) -> Recipe:
    """Return the recipe of the training alone: the same data, seed, measurements and device."""
    # A default dataset stays unset, since it depends on the model.
    # Training reads one source: the largest that is plain text.
    sources = split_sources(recipe.calibrate.data)
    plain = [source for source in sources if source.is_text and not reads_conversations(source)]
    named = "data" in recipe.calibrate.model_fields_set and plain
    data = {"dataset": max(plain, key=lambda source: source.share).name} if named else {}
    kept = ("model", "device", "cache_dir", "exclude", "seqlen", "seed", "bos", "report_to")
    same = [word for word, leaf in LEAVES.items() if leaf.path[0] in ("train", "evaluate") or word in kept]
    # Only for requested answers, since the dense model has to be loaded again.
    compares = recipe.evaluate.answers.compares or has_teacher(recipe.train.mode)
    teacher = (recipe.train.teacher or recipe.model.name) if compares else None
    return make_recipe({word: recipe.setting(word) for word in same} | data | {"finetune_teacher": teacher})


def train(run: Run) -> FinetuneReport:
    """Fine-tune a model. Raises as `coprune.finetune`."""
    from coprune.training.finetuning import run_finetuning  # needs an extra and takes seconds to import

    if run.first:
        with run.taking():
            pass  # everything was checked before the model was made
    report = run_finetuning(run.recipe, run.reporter, after_pruning=True)
    for line in str(report).splitlines():
        run.reporter.say(line)
    return report


def finished_training(recipe: Recipe) -> FinetuneReport | None:
    """Return the report of a finished training in a recipe's folder, if the model is there."""
    try:
        report = read_as(FinetuneReport, recipe.training_folder / REPORT_FILE)
    except BadInput:
        return None
    return report if report.saved_model is None or holds_model(report.saved_model) else None


def check_training(recipe: Recipe, loaded: Loaded | None) -> None:
    """Check the training of a model that is yet to be made.

    Args:
        recipe: of the whole run.
        loaded: the model if it was passed in memory, whose name may not lead to files.

    Raises:
        BadInput: there is no teacher, the training could never fit, or the chat template fails.
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
    """Refuse to distil from a model that is only in memory, since pruning changes it."""
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
    """Refuse a training that could never fit, before anything is pruned; with parts removed, there is less to train."""
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
