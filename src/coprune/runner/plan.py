"""The plan of a recipe: its steps, each with its own settings, source and folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprune.recipe.recipe import Recipe
from coprune.steps.order import STEPS
from coprune.steps.recipe_step import StepOfRecipe


@dataclass(frozen=True)
class Planned:
    """A step of a plan. folder: of its results; None for the only step of a run, and for results kept in memory."""

    step: type[StepOfRecipe]
    recipe: Recipe
    folder: Path | None = None


def plan_of(recipe: Recipe, between: Path | None = None) -> list[Planned]:
    """Return the plan of a recipe.

    Args:
        recipe: the recipe.
        between: parent of the steps' folders, if there are several; None to pass models in memory.

    Raises:
        BadInput: the settings of a training contradict each other.
    """
    steps = steps_of(recipe)
    if len(steps) == 1:
        return [Planned(steps[0], recipe)]
    plan, dense = list[Planned](), recipe
    for step in steps:
        own, is_last = step.part_of(dense).replaced(**_OF_THE_WHOLE), step is steps[-1]
        folder = None if between is None else between / step.name
        model = recipe.output.model if is_last else None
        if model is None and folder is not None and (step.always_saves or not is_last):
            model = folder / "model"
        if plan and plan[-1].recipe.output.model is not None:
            own = own.replaced(model=str(plan[-1].recipe.output.model))
        plan.append(Planned(step, own.replaced(save=folder, save_model=model), folder))
        if step.leaves_dense:
            dense = recipe.replaced(model=str(model))
    return plan


def steps_of(recipe: Recipe) -> list[type[StepOfRecipe]]:
    """Return the steps that a recipe requires, in order."""
    return [step for step in STEPS if step.is_asked(recipe)]


_OF_THE_WHOLE: dict[str, Any] = {"push_to_hub": None, "private": None, "overwrite": None}
