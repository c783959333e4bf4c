"""Runs from GGUF file to GGUF file: experts and blocks are chosen as in any run, and their bytes left out of the copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.words import Command, LeaveOut, Words
from coprune.gguf_files.removed_parts import GgufParts
from coprune.model.blocks import Block
from coprune.model.checkpoint.locate import GgufFile, locate, locates_gguf
from coprune.model.checkpoint.mapped_gguf import LazyGguf
from coprune.model.checkpoint.weights import Weights
from coprune.recipe.recipe import Recipe
from coprune.run.context import Given, Run

_INSTEAD: Words = ("name a folder, and run: ", Command("export", "FOLDER", "OUT.gguf"))


def require_gguf_source(recipe: Recipe, given: Given) -> None:
    """Raise BadInput if a GGUF file is requested of a model that is not one."""
    if given.loaded is not None or not locates_gguf(recipe.model.name):
        raise _refused(recipe, "the model is not one" if given.loaded is None else "the model is in memory")


def refuse_other_changes(recipe: Recipe, given: Given) -> None:
    """Raise BadInput if a GGUF file is requested with changes other than the removal of experts and blocks."""
    require_gguf_source(recipe, given)
    kinds = [kind for kind in recipe.remove.kinds if kind not in ("experts", "blocks")]
    if kinds:
        raise _refused(recipe, f"removing {kinds[0]} rewrites the values of its tensors")
    if recipe.remove.maps_blocks and recipe.remove.score:
        raise _refused(recipe, "the map of blocks changes the values of its tensors")
    if recipe.sets_zeros:
        raise _refused(recipe, "zeros change the values of its tensors")
    if recipe.train.mode is not None or recipe.prune.reconstruct.steps:
        raise _refused(recipe, "a training changes the values of its tensors")
    if recipe.output.push_to_hub is not None:
        raise BadInput(
            "only the folder of a model is pushed to the Hub",
            field="push_to_hub",
            value=recipe.output.push_to_hub,
            fix=(LeaveOut("push_to_hub"), f", and later: hf upload {recipe.output.push_to_hub} {recipe.output.model}"),
        )


def _refused(recipe: Recipe, why: str) -> BadInput:
    target = recipe.output.model
    return BadInput(f"{target} would be a GGUF file, and {why}", field="save_model", value=target, fix=_INSTEAD)


def cut_of(run: Run, routers: Mapping[str, Sequence[Tensor]]) -> GgufParts | None:
    """Return the source file of a run that writes GGUF, prepared for the removal; None for other runs.

    Args:
        run: the run.
        routers: the routers' matrices by block, for blocks that lose experts.

    Raises:
        UnsupportedModel: the file's blocks or routers differ from the loaded model's.
    """
    recipe = run.recipe
    if not recipe.output.as_gguf:
        return None
    file = locate(recipe.model.name, recipe.model.cache_dir)
    assert isinstance(file, GgufFile)
    parts = GgufParts(file, run.model.names)
    for block in run.model.blocks:
        for router in routers.get(block.name, ()):
            parts.require_router(block.name, _values(run.model.weights, block, router))
    return parts


def _values(weights: Weights, block: Block, parameter: Tensor) -> Tensor:
    """Return a parameter of a block, from the file if it is not loaded."""
    if not parameter.is_meta:
        return parameter
    assert isinstance(weights, LazyGguf)
    name = next(name for name, one in block.module.named_parameters(block.name) if one is parameter)
    return weights.parameter(name)
