"""The steps of a recipe, in the order in which they are executed."""

from __future__ import annotations

from coprune.steps.prune import Prune
from coprune.steps.recipe_step import StepOfRecipe
from coprune.steps.remove import Remove
from coprune.steps.train import Train
from coprune.steps.trim import Trim

STEPS: tuple[type[StepOfRecipe], ...] = (Trim, Remove, Prune, Train)
