"""Shared keys and values: readers see those of the pruned producer, as in forwards of the whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import coprune
from coprune.model.blocks import find_blocks
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver
from coprune.recipe.pattern import Target, parse_pattern
from support.pico import SHARING, pico_model, pico_tokens, randomise_vectors
from support.pico_folder import save_pico, write_words
from support.walking import (
    Propagation,
    inputs_by_full_forwards,
    layers_of,
    masks,
    prove,
    prune_with_full_forwards,
    prune_with_walk,
    share_of_different_entries,
    wanda_as_published,
)

HALF = Target(parse_pattern("unstructured"), 0.5)
BATCHES = list(pico_tokens(6).split(2))


@pytest.mark.parametrize("family", SHARING)
def test_shared_keys_and_values_are_found_and_passed_on(family: str) -> None:
    structure = prove(pico_model(family), BATCHES[0][:1]).structure
    assert structure.streams == ("shared_kv_states",)
    assert prove(pico_model(family, num_kv_shared_layers=0), BATCHES[0][:1]).structure.streams == ()


@pytest.mark.parametrize("propagation", ["block", "sequential"])
@pytest.mark.parametrize("family", SHARING)
def test_masks_of_encoder_decoders_match_whole_forwards(family: str, propagation: Propagation) -> None:
    if (family, propagation) == ("gemma3n_text", "sequential"):
        pytest.skip("a router of its own is used twice, so it is refused")
    model, oracle = pico_model(family), pico_model(family)
    for one in (model, oracle):
        randomise_vectors(one)  # a scale initialised to zero would hide later layers
    prune_with_walk(model, BATCHES, Solver(METHODS["wanda"]), HALF, propagation)
    prune_with_full_forwards(oracle, BATCHES, wanda_as_published(HALF), propagation)
    assert share_of_different_entries(masks(model), masks(oracle)) < 1e-3


def test_dense_propagation_sees_the_dense_encoder_decoder() -> None:
    model = pico_model("gemma4_text")
    dense, solve = copy.deepcopy(model), wanda_as_published(HALF)
    inputs = inputs_by_full_forwards(
        dense, [layer for block in find_blocks(dense) for layer in layers_of(block)], BATCHES
    )
    layers = {layer.name: layer for block in find_blocks(dense) for layer in layers_of(block)}
    prune_with_walk(model, BATCHES, Solver(METHODS["wanda"]), HALF, "dense")
    with torch.no_grad():
        for name, x in inputs.items():
            layers[name].weight.copy_(solve(layers[name].weight, x))
    assert share_of_different_entries(masks(model), masks(dense)) < 1e-3


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_streamed_paged_and_in_memory_runs_are_identical(tmp_path: Path) -> None:
    """With interleaved batches, hidden states on disk, and blocks trained toward the dense model's."""
    model = save_pico(tmp_path / "model", "gemma4_text")
    text = write_words(tmp_path / "words.txt")
    found = []
    ways: dict[str, dict[str, Any]] = {"memory": {"stream": False}, "disk": {"activation_memory": 0.0}}
    for name, own in ways.items():
        settings: dict[str, Any] = dict(
            dataset=text, nsamples=8, seqlen=16, sparsity=0.5, evaluate=False, quiet=True, reconstruct=3
        )
        folder = tmp_path / name
        coprune.prune(
            model, "wanda", propagation="sequential", save=folder / "run", save_model=folder / "model", **settings | own
        )
        found.append(tensors(folder / "model"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
