"""Pruning a model in memory with the walk, and with only full forwards of the whole model, as the oracle."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coprune.data.pairs import Pairs
from coprune.model.blocks import Block, find_blocks
from coprune.model.checkpoint.load import prepare
from coprune.model.checkpoint.weights import InMemory
from coprune.model.matrices import Matrix, find_matrices
from coprune.model.matrix_choice import choose_matrices
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.model.walk.prove import prove_replay
from coprune.model.walk.recording import BY_BLOCK, Dense, Moves, Sequential, record_batches
from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.model.walk.walk import Walk
from coprune.pruning.pruner import MatrixResult, Solver, prune_walk
from coprune.recipe.pattern import NM, Target
from support.published import published_wanda

Propagation = Literal["block", "sequential", "dense"]
MOVES: dict[Propagation, Moves] = {"block": BY_BLOCK, "sequential": Sequential(), "dense": Dense()}
Solve = Callable[[Tensor, Tensor], Tensor]
"""From a weight (O × I) and all its inputs (T × I) to the pruned weight."""


def make_walk(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    statistic: type[Statistic] | None = InputNorm,
    moves: Moves = BY_BLOCK,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Walk:
    """Return a walk over a proven model in memory."""
    proven = prove(model, batches[0][:1], include, exclude)
    return Walk(proven, record_batches(proven, batches), statistic, moves)


def prove(
    model: PreTrainedModel, sample: Tensor, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> ProvenModel:
    """Return a model in memory with its blocks and chosen matrices, proven on a sample."""
    weights = InMemory(prepare(model))
    blocks = find_blocks(model)
    return prove_replay(FoundModel(weights, blocks, choose_matrices(model, blocks, include, exclude)), sample)


def prune_with_walk(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    solver: Solver,
    target: Target,
    propagation: Propagation = "block",
    **choice: Sequence[str],
) -> list[MatrixResult]:
    """Prune the model in place, matrix by matrix in the walk."""
    walk = make_walk(model, batches, solver.statistic, MOVES[propagation], **choice)
    return prune_walk(walk, solver, lambda matrix: target)


@dataclass
class Layer:
    """A linear layer of a block for the oracle, including convolutions of non-overlapping patches."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """O × I, a view."""
        weight = self.module.get_parameter("weight").detach()
        return weight.T if isinstance(self.module, Conv1D) else weight.flatten(1)

    def rows(self, x: Tensor) -> Tensor:
        """Return the layer's inputs as rows, T × I; of a convolution by torch's own unfolding."""
        if not isinstance(self.module, nn.Conv2d):
            return x.reshape(-1, x.shape[-1])
        columns = functional.unfold(x, self.module.kernel_size, stride=self.module.stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def layers_of(block: Block) -> list[Layer]:
    """Return all linear layers of a block, without depth-wise convolutions."""
    return [
        Layer(f"{block.name}.{name}".removesuffix("."), module)
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]


def layers_sharing(model: nn.Module) -> list[list[Layer]]:
    """Return groups of linear layers in several blocks that share a weight."""
    same: dict[int, list[Layer]] = {}
    for layer in (layer for block in find_blocks(model) for layer in layers_of(block)):
        same.setdefault(layer.weight.data_ptr(), []).append(layer)
    return [layers for layers in same.values() if len({layer.name for layer in layers}) > 1]


@contextmanager
def watched(layers: Iterable[Layer]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the layers' inputs (T × I) within the body, by name in order of first use."""
    seen: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for layer in layers:

            def hook(module: nn.Module, arguments: tuple[Tensor, ...], layer: Layer = layer) -> None:
                seen.setdefault(layer.name, []).append(layer.rows(arguments[0]).float().clone())

            stack.callback(layer.module.register_forward_pre_hook(hook).remove)
        yield seen


def full_forward(model: PreTrainedModel, batch: Tensor) -> None:
    """Run the whole model on a batch of tokens (samples × S), pairs, or pixels (images × channels × height × width)."""
    if isinstance(batch, Pairs):
        model(**{model.main_input_name: batch.source}, decoder_input_ids=batch.written, use_cache=False)
    elif batch.is_floating_point():
        model(pixel_values=batch)
    else:
        model(input_ids=batch, use_cache=False)


@torch.no_grad()
def inputs_by_full_forwards(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the layers' inputs in forwards of the model in its present state, in order of first use."""
    with watched(layers) as seen:
        for batch in batches:
            full_forward(model, batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


@torch.no_grad()
def prune_with_full_forwards(
    model: PreTrainedModel, batches: Sequence[Tensor], solve: Solve, propagation: Propagation
) -> None:
    """Prune the model in place, every block or matrix after full forwards of the model pruned so far."""
    model.eval()
    for block in find_blocks(model):
        layers = {layer.name: layer for layer in layers_of(block)}
        inputs = inputs_by_full_forwards(model, list(layers.values()), batches)
        for name in inputs:
            if propagation == "sequential":
                inputs |= inputs_by_full_forwards(model, [layers[name]], batches)
            layers[name].weight.copy_(solve(layers[name].weight, inputs[name]))


@torch.no_grad()
def prune_shared_with_full_forwards(
    model: PreTrainedModel, batches: Sequence[Tensor], solve: Solve, alone: Container[str] = ()
) -> dict[str, str]:
    """Prune weights shared by layers of several blocks in place, by all their inputs in the present model.

    alone: names of layers to leave alone. Returns the sharing layers' names, each with the first one of the same weight.
    """
    sharing = [layers for layers in layers_sharing(model) if layers[0].name not in alone]
    inputs = inputs_by_full_forwards(model, [layer for layers in sharing for layer in layers], batches)
    for layers in sharing:
        given = torch.cat([inputs[layer.name] for layer in layers if layer.name in inputs])
        layers[0].weight.copy_(solve(layers[0].weight, given))
    return {layer.name: layers[0].name for layers in sharing for layer in layers}


def matrices_of(model: PreTrainedModel) -> list[Matrix]:
    """Return all weights in the blocks that are matrices."""
    return [matrix for block in find_blocks(model) for matrix in find_matrices(block.module, block.name)]


def masks(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return where the blocks' weights are not zero, by layer name."""
    return {layer.name: layer.weight != 0 for block in find_blocks(model) for layer in layers_of(block)}


def wanda_as_published(target: Target) -> Solve:
    """Return Wanda's published procedure as a function from a weight and all its inputs to the pruned weight."""
    n, m = (target.pattern.m - target.pattern.n, target.pattern.m) if isinstance(target.pattern, NM) else (0, 0)

    def solve(weight: Tensor, x: Tensor) -> Tensor:
        return weight.masked_fill(published_wanda(weight, x.square().mean(dim=0), target.sparsity, n, m), 0)

    return solve


def share_of_different_entries(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the share of entries in which two sets of masks differ."""
    assert a.keys() == b.keys()
    return sum(int((a[name] != b[name]).sum()) for name in a) / sum(mask.numel() for mask in a.values())
