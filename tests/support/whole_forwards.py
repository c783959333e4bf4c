"""The oracle for any family: every linear layer and expert, pruned after full forwards of the whole model."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.model.blocks import Block, find_blocks
from coprune.model.checkpoint.load import prepare
from coprune.recipe.pattern import NM, Target
from support.products import Part, watch_products
from support.published import published_magnitude, published_wanda
from support.walking import (
    full_forward,
    inputs_by_full_forwards,
    layers_of,
    prune_shared_with_full_forwards,
    wanda_as_published,
)


def prune_by_whole_forwards(
    model: PreTrainedModel, batches: Sequence[Tensor], target: Target, alone: Collection[str]
) -> dict[str, Tensor]:
    """Prune the model in place with Wanda, block by block, each by forwards of the model pruned so far.

    Weights shared by blocks are pruned first.

    Args:
        model: changed in place.
        batches: the calibration batches.
        target: pattern and sparsity.
        alone: kinds of layers (names with `*` for numbers) to leave alone.

    Returns:
        The kept weights (bool, O × I) by the names of the matrices.
    """
    prepare(model)  # experts one by one
    kept: dict[str, Tensor] = {}
    solve = wanda_as_published(target)
    every = [layer for block in find_blocks(model) for layer in layers_of(block)]
    left = {layer.name for layer in every if kind_of(layer.name) in alone}
    shared = prune_shared_with_full_forwards(model, batches, solve, left)
    kept |= {layer.name: layer.weight != 0 for layer in every if shared.get(layer.name) == layer.name}
    for block in find_blocks(model):
        layers = [layer for layer in layers_of(block) if layer.name not in left and layer.name not in shared]
        inputs = inputs_by_full_forwards(model, layers, batches)
        parts = _parts(model, batches, block, {layer.name for layer in layers} - inputs.keys())
        for layer in layers:
            if layer.name in inputs:
                layer.weight.copy_(solve(layer.weight, inputs[layer.name]))
                kept[layer.name] = layer.weight != 0
        for part in parts:
            name = part.name.removesuffix(".weight")
            if kind_of(name) not in alone:
                part.weight.copy_(_solve_part(part, parts, target))
                kept[name] = part.weight != 0
    return kept


def kind_of(name: str) -> str:
    """Return a name with `*` for its numbers."""
    return re.sub(r"(?<=[.\[])\d+(?=[.\]]|$)", "*", name)


def _parts(model: PreTrainedModel, batches: Sequence[Tensor], block: Block, unseen: Collection[str]) -> list[Part]:
    """Return weights outside layers' forwards: experts, and weights used without calling their layer."""
    parameters = {f"{block.name}.{name}": parameter for name, parameter in block.module.named_parameters()}
    bare = {name for name, p in parameters.items() if p.ndim == 3 or (p.ndim == 2 and not name.endswith(".weight"))}
    watched = {name: p for name, p in parameters.items() if name in bare or name.removesuffix(".weight") in unseen}

    def run() -> None:
        for batch in batches:
            full_forward(model, batch)

    return watch_products(watched, run)


def _solve_part(part: Part, parts: Sequence[Part], target: Target) -> Tensor:
    """Prune with Wanda; an expert with fewer tokens than inputs uses its layer's average, too."""
    n, m = (target.pattern.m - target.pattern.n, target.pattern.m) if isinstance(target.pattern, NM) else (0, 0)
    weight, x = part.weight, part.x
    if not len(x):
        return weight.masked_fill(published_magnitude(weight, target.sparsity, n, m), 0)
    stack = part.name.partition("[")[0]
    pool = torch.cat([other.x for other in parts if other.name.partition("[")[0] == stack]).square().mean(dim=0)
    missing = max(0, x.shape[1] - len(x))
    mean_square = (x.square().sum(dim=0) + missing * pool) / (len(x) + missing)
    return weight.masked_fill(published_wanda(weight, mean_square, target.sparsity, n, m), 0)
