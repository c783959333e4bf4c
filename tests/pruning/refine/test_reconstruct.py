"""Block reconstruction: closer to the dense model on what it never trained on, with every zero kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.model.walk.recording import record_batches
from coprune.model.walk.shown import BlockDone
from coprune.model.walk.walk import Walk
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import MatrixResult, Solver, prune_walk, reconstruct_block
from coprune.pruning.refine.reconstruct import Reconstruction
from coprune.recipe.pattern import NM, Target
from support.pico import pico_model, pico_tokens
from support.walking import MOVES, Propagation, prove

BATCHES = pico_tokens(24, 32).split(2)
FRESH = pico_tokens(8, 32, seed=1)


def pruned(
    reconstruction: Any, propagation: Propagation = "sequential", aims: bool = True
) -> tuple[PreTrainedModel, list[MatrixResult]]:
    """A pico model at 2:4, reconstructed if asked for; aims: whether dense states are kept only where they are looked at."""
    model = pico_model("llama")
    proven = prove(model, BATCHES[0])
    recording = record_batches(proven, BATCHES)
    solver = Solver(METHODS["wanda"])
    if reconstruction is not None:
        recording.dense = recording.hidden.copy()
        recording.aims = reconstruction.batches_used(len(BATCHES)) if aims else None
    moves = replace(MOVES[propagation], keep_inputs=reconstruction is not None)  # type: ignore[arg-type]
    walk = Walk(proven, recording, solver.statistic, moves)

    def block_done(done: BlockDone, results: list[MatrixResult]) -> list[MatrixResult]:
        return results if reconstruction is None else reconstruct_block(reconstruction, done, recording, results)

    results = prune_walk(walk, solver, lambda matrix: Target(NM(2, 4), 0.5), block_done=block_done)
    return model, results


def distance(model: PreTrainedModel) -> float:
    with torch.no_grad():
        dense, found = pico_model("llama")(FRESH).logits, model(FRESH).logits
    return float((found - dense).norm() / dense.norm())


@pytest.mark.parametrize("propagation", ["block", "sequential"])
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"parts": "separate"}])
def test_it_comes_nearer_to_the_dense_model_and_keeps_every_zero(
    propagation: Propagation, changes: dict[str, Any]
) -> None:
    plain, before = pruned(None, propagation)
    trained, after = pruned(Reconstruction(steps=40, **changes), propagation)
    assert distance(trained) < distance(plain)
    first = [result.mask_checksum for result in before if result.name.startswith("model.layers.0.")]
    assert first == [result.mask_checksum for result in after if result.name.startswith("model.layers.0.")]
    for name, parameter in trained.named_parameters():
        if "_proj" in name:
            assert bool(((parameter != 0).unflatten(1, (-1, 4)).sum(dim=2) == 2).all()), name


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_dense_states_that_nobody_looks_at_make_no_difference(steps: int) -> None:
    reconstruction = Reconstruction(steps=steps)
    used = reconstruction.batches_used(len(BATCHES))
    assert len(used) == min(steps, len(BATCHES) - 1) + 1
    with_all, _ = pruned(reconstruction, aims=False)
    with_few, _ = pruned(reconstruction)
    assert all(torch.equal(a, b) for a, b in zip(with_all.parameters(), with_few.parameters(), strict=True))


def test_a_block_that_training_makes_worse_is_left_as_it_was() -> None:
    model, results = pruned(Reconstruction(steps=2, learning_rate=1e3))
    plain, _ = pruned(None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert "block reconstruction" in results[0].events[-1]


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"steps": 0}, {"learning_rate": -1.0}, {"held_out": -0.5}):
        with pytest.raises(BadInput):
            Reconstruction(**settings)
