"""The command that makes a recipe, shown on pages, in tables and listings."""

from __future__ import annotations

from coprune.base.words import Command, Set, say
from coprune.recipe.flags import CommandLine
from coprune.recipe.recipe import DEFAULTS, Recipe

_DATA = "dataset"


def command_of(recipe: Recipe) -> str:
    """Return `coprune prune …`, quoted for a shell, that makes the same recipe whatever the defaults of the command.

    The method is always named: without one, the command uses a preset.
    """
    said = recipe.flat()
    model, _ = said.pop("model"), said.pop("options")
    said["method"] = str(recipe.prune.method)
    # The default calibration data depends on the model's inputs.
    named = {"method", *([_DATA] if "data" in recipe.calibrate.model_fields_set else [])}
    parts: list[Set] = []
    for name, value in said.items():
        if name in named or value != DEFAULTS[name]:
            parts += [Set(name, one) for one in (value if isinstance(value, tuple) else (value,))]
    first = Set("model", model) if model.startswith("-") else model
    return say(Command("prune", first, *parts), CommandLine())
