"""The training of a preset: of the whole model if it fits the memory, else block by block."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from coprune.base.errors import BadInput
from coprune.model.checkpoint.load import task_at
from coprune.model.checkpoint.locate import locate
from coprune.model.checkpoint.source_encoding import is_quantised
from coprune.model.loaded_model import choose_device
from coprune.recipe.flat import PRESET, TRAIN, flatten, layered
from coprune.recipe.presets import MENDS, WHOLE
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.training.footprint import require_room_to_train


def recipe_that_fits(settings: Mapping[str, Any], in_memory: bool = False) -> Recipe:
    """Make a recipe whose preset, if it names one that trains and does not say where, trains where that fits.

    Args:
        settings: as `make_recipe` takes them.
        in_memory: whether no files hold the dense model to train toward, or nothing is to be written.

    Returns:
        The recipe. Raises BadInput as `make_recipe` does, and for a model that is not there.
    """
    recipe = make_recipe(settings)  # what is wrong is told before a model is looked for
    said = flatten(settings)
    rules_out = said.get("stream") or said.get("encoding") not in (None, "dense") or TRAIN in said
    mended = any(word.startswith(MENDS) for word in said)
    if said.get(PRESET) not in WHOLE or rules_out or mended or in_memory or not _fits(recipe):
        return recipe
    return make_recipe(layered(settings, {TRAIN: "whole"}))


def _fits(recipe: Recipe) -> bool:
    """Return whether the whole model can be trained here beside the dense one, and be saved as the source is."""
    if find_spec("peft") is None:
        return False
    location = locate(recipe.model.name, recipe.model.cache_dir, weights=False)
    if task_at(location) != "text":
        return False  # how long a preset trains is said in tokens
    if recipe.output.encoding != "dense" and location.path.is_dir() and is_quantised(location.path):
        return False  # what is trained as a whole is saved dense
    try:
        require_room_to_train(location, "blocks", True, choose_device(recipe.model.device))
    except BadInput:
        return False
    return True
