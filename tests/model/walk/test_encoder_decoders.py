"""Encoder-decoders: the decoder is pruned after the pruned encoder, as in forwards of the whole model."""

from __future__ import annotations

import copy

import pytest

from coprune.model.blocks import find_blocks
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver
from coprune.recipe.pattern import Target, parse_pattern
from support.pico_pairs import pico_pair_model, pico_pairs
from support.sample import crossed
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


def test_blocks_of_the_encoder_come_before_the_decoders() -> None:
    blocks = find_blocks(pico_pair_model("T5"))
    assert [(block.index, block.name, block.part) for block in blocks] == [
        (0, "encoder.block.0", 0),
        (1, "encoder.block.1", 0),
        (2, "decoder.block.0", 1),
        (3, "decoder.block.1", 1),
        (4, "decoder.block.2", 1),
    ]


def test_the_proof_finds_states_passed_between_blocks() -> None:
    model = pico_pair_model("T5")
    handed = prove(model, pico_pairs(model, 1)).structure.handed
    # Position biases from block to block, and the encoder's states to every block of the decoder.
    assert [one.takes for one in handed] == [(), (1,), (2,), (1, 4, 2), (1, 4, 2)]
    assert [one.leaves for one in handed] == [((1, 1),), (), ((1, 1), (2, 4)), ((1, 1), (2, 4)), ()]


@pytest.mark.parametrize(("family", "propagation"), crossed(["Bart", "T5", "Whisper"], ["block", "sequential"]))
def test_masks_of_encoder_decoders_match_whole_forwards(family: str, propagation: Propagation) -> None:
    model, oracle = pico_pair_model(family), pico_pair_model(family)
    batches = list(pico_pairs(model, 6).split(2))
    prune_with_walk(model, batches, Solver(METHODS["wanda"]), HALF, propagation)
    prune_with_full_forwards(oracle, batches, wanda_as_published(HALF), propagation)
    assert share_of_different_entries(masks(model), masks(oracle)) < 1e-3


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_dense_propagation_sees_the_dense_encoder_decoder(family: str) -> None:
    model = pico_pair_model(family)
    batches, dense, solve = list(pico_pairs(model, 6).split(2)), copy.deepcopy(model), wanda_as_published(HALF)
    layers = [layer for block in find_blocks(dense) for layer in layers_of(block)]
    inputs = inputs_by_full_forwards(dense, layers, batches)
    prune_with_walk(model, batches, Solver(METHODS["wanda"]), HALF, "dense")
    expected = {layer.name: solve(layer.weight, inputs[layer.name]) != 0 for layer in layers}
    assert share_of_different_entries(masks(model), expected) < 1e-3
