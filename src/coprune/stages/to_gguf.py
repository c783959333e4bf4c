"""A run that makes a GGUF file of another one: experts and blocks are chosen as in any run, and left out of the file's bytes."""

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
    """Raise BadInput where a GGUF file should be made of something else."""
    if given.loaded is not None or not locates_gguf(recipe.model.name):
        raise _refused(recipe, "the model is no such file" if given.loaded is None else "the model is in memory")


def refuse_other_changes(recipe: Recipe, given: Given) -> None:
    """Raise BadInput where more is asked for than to leave experts and blocks out of a GGUF file."""
    require_gguf_source(recipe, given)
    kinds = [kind for kind in recipe.remove.kinds if kind not in ("experts", "blocks")]
    if kinds:
        raise _refused(recipe, f"{kinds[0]} go from inside of its tensors, whose values are stored anew then")
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
    """Return the file that a run makes another one of; None where it does not.

    Args:
        run: what it is asked and has found.
        routers: by block, the matrices that choose among experts, where some of these go.

    Raises:
        UnsupportedModel: its blocks or routers are not those of the model that was made of it.
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
    """Return a parameter of a block that may be on the disk."""
    if not parameter.is_meta:
        return parameter
    assert isinstance(weights, LazyGguf)
    name = next(name for name, one in block.module.named_parameters(block.name) if one is parameter)
    return weights.parameter(name)
