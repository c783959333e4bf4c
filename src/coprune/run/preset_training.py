"""The training of a preset: of the whole model if it fits in memory, else block by block."""

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
    """Make a recipe; a preset that trains trains the whole model if that fits, else block by block.

    Args:
        settings: as in `make_recipe`.
        in_memory: whether there are no files of the dense model to train toward, or nothing may be written.

    Returns:
        The recipe. Raises BadInput as `make_recipe` does, and for a missing model.
    """
    recipe = make_recipe(settings)  # bad settings are reported before the model is looked up
    said = flatten(settings)
    rules_out = said.get("stream") or said.get("encoding") not in (None, "dense") or TRAIN in said
    mended = any(word.startswith(MENDS) for word in said)
    if said.get(PRESET) not in WHOLE or rules_out or mended or in_memory or not _fits(recipe):
        return recipe
    return make_recipe(layered(settings, {TRAIN: "whole"}))


def _fits(recipe: Recipe) -> bool:
    """Return whether the whole model can be trained here beside the dense one and saved in the source's encoding."""
    if find_spec("peft") is None:
        return False
    location = locate(recipe.model.name, recipe.model.cache_dir, weights=False)
    if task_at(location) != "text":
        return False  # a preset's training length is given in tokens
    if recipe.output.encoding != "dense" and location.path.is_dir() and is_quantised(location.path):
        return False  # a model trained as a whole is saved dense
    try:
        require_room_to_train(location, "blocks", True, choose_device(recipe.model.device))
    except BadInput:
        return False
    return True
