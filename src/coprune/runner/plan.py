"""The plan of a recipe: the steps that it comes to, each with the settings that are its own, its source and its folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coprune.data.mixture import reads_conversations
from coprune.recipe.choice import USUAL_METHOD, Choice
from coprune.recipe.parts import PrunePart
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.recipe.sources import split_sources
from coprune.recipe.structure import RemovePart
from coprune.recipe.train import TrainPart, has_teacher
from coprune.recipe.tree import LEAVES
from coprune.removal.unit_scores import SPREADINGS

Name = Literal["trim", "remove", "prune", "train"]


@dataclass(frozen=True)
class Planned:
    """A step of a plan. folder: where it is made and found again; None for a run's only step, and for what stays in memory."""

    name: Name
    recipe: Recipe
    folder: Path | None = None


def plan_of(recipe: Recipe, between: Path | None = None) -> list[Planned]:
    """Return the steps that a recipe comes to.

    Args:
        recipe: what is asked for.
        between: holds the folders of several steps; None to leave in memory what one leaves to the next.

    Raises:
        BadInput: the settings of a training contradict each other.
    """
    names = steps_of(recipe)
    if len(names) == 1:
        return [Planned(names[0], recipe)]
    plan, dense = list[Planned](), recipe
    for name in names:
        own, is_last = _OWN[name](dense).replaced(**_OF_THE_WHOLE), name == names[-1]
        folder = None if between is None else between / name
        model = recipe.output.model if is_last else None
        if model is None and folder is not None and (name == "train" or not is_last):
            model = folder / "model"
        if plan and plan[-1].recipe.output.model is not None:
            own = own.replaced(model=str(plan[-1].recipe.output.model))
        plan.append(Planned(name, own.replaced(save=folder, save_model=model), folder))
        if name == "trim":  # all that follows takes what it leaves for the dense model
            dense = recipe.replaced(model=str(model))
    return plan


def steps_of(recipe: Recipe) -> list[Name]:
    """Return the names of the steps that a recipe comes to, in order."""
    asked: dict[Name, bool] = {
        "trim": recipe.remove.vocabulary is not None,
        "remove": bool(recipe.remove.kinds),
        "prune": recipe.sets_zeros,
        "train": recipe.train.mode is not None,
    }
    return [name for name, is_asked in asked.items() if is_asked]


def after_trim(recipe: Recipe) -> Recipe | None:
    """Return what a run does once it has cut a vocabulary; None for nothing."""
    left = recipe.model_copy(update={"remove": recipe.remove.without_vocabulary()})
    return left if left.remove.parts or recipe.sets_zeros else None


_OF_THE_WHOLE: dict[str, Any] = {"push_to_hub": None, "private": None, "overwrite": None}
_UNTOLD: dict[str, Any] = {"report_to": None, "log_json": None}
_UNASKED: dict[str, Any] = {"generate": None, "require": None}
_UNIFORM = Choice(name="uniform")


def _trimming(recipe: Recipe) -> Recipe:
    alone = {"remove": recipe.remove.vocabulary_alone(), "prune": PrunePart(), "train": TrainPart()}
    own = recipe.model_copy(update=alone)
    return own.replaced(**_UNASKED, **_UNTOLD, tasks=None, eval_zero_shot=False)


def _removing(recipe: Recipe) -> Recipe:
    own = _untrained(recipe).model_copy(update={"remove": recipe.remove.without_vocabulary()})
    if not recipe.sets_zeros:
        return own
    zeros = {"pattern": "unstructured", "sparsity": None, "permute": False, "rotate": False, "refine": ()}
    more = {"method": USUAL_METHOD, "propagation": "block", "encoding": "source", "prompt": ""}
    allocation = recipe.prune.allocation if _spreads_units(recipe) else _UNIFORM
    return own.replaced(**zeros, **more, **_UNTOLD, allocation=allocation)


def _pruning(recipe: Recipe) -> Recipe:
    own = _untrained(recipe).model_copy(update={"remove": RemovePart()})
    if not recipe.remove.kinds:
        return own
    # Answers are held against conditions where the dense model's are known, which is not there; but they are looked at.
    require = "loops>=0" if own.evaluate.answers.conditions else None
    return own.replaced(allocation=allocation_of_zeros(recipe), evaluate_dense=False, prompt="", require=require)


def allocation_of_zeros(recipe: Recipe) -> Choice:
    """Return the allocation of zeros over matrices, where a recipe's may be of channels and heads over blocks."""
    return _UNIFORM if _spreads_units(recipe) else recipe.prune.allocation


def _spreads_units(recipe: Recipe) -> bool:
    return recipe.remove.spreads and recipe.prune.allocation.name in SPREADINGS


def _untrained(recipe: Recipe) -> Recipe:
    """Return the recipe of what comes before a training, which asks the model itself."""
    if recipe.train.mode is None:
        return recipe
    return recipe.model_copy(update={"train": TrainPart()}).replaced(**_UNASKED)


def training_of(recipe: Recipe) -> Recipe:
    """Return the recipe of the training alone: the same data, seed, measurements and device."""
    # A default dataset stays unset, since it depends on the model.
    # Of several the largest that is text as it stands: a training reads one.
    sources = split_sources(recipe.calibrate.data)
    plain = [source for source in sources if source.is_text and not reads_conversations(source)]
    named = "data" in recipe.calibrate.model_fields_set and plain
    data = {"dataset": max(plain, key=lambda source: source.share).name} if named else {}
    kept = ("model", "device", "cache_dir", "exclude", "seqlen", "seed", "bos", "report_to")
    same = [word for word, leaf in LEAVES.items() if leaf.path[0] in ("train", "evaluate") or word in kept]
    # Only for requested answers, since the dense model has to be loaded again.
    answers = recipe.evaluate.answers
    compares = answers.prompts is not None or any(condition.needs_dense for condition in answers.conditions)
    teacher = (recipe.train.teacher or recipe.model.name) if compares or has_teacher(recipe.train.mode) else None
    return make_recipe({word: recipe.setting(word) for word in same} | data | {"finetune_teacher": teacher})


_OWN: dict[Name, Callable[[Recipe], Recipe]] = {
    "trim": _trimming,
    "remove": _removing,
    "prune": _pruning,
    "train": training_of,
}
