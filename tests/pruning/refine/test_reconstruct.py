"""Block reconstruction: closer to the dense model on held-out data, with every zero kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.recording import record_batches
from coprune.model.walk.walk import Walk
from coprune.pruning.block_training import BlockTraining, rates_to_try, reconstruct_block
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import MatrixResult, Solver, prune_walk
from coprune.pruning.refine.reconstruct import Reconstruction
from coprune.recipe.pattern import NM, Target
from support.pico import FAMILIES, MIXTURES, pico_model, pico_tokens
from support.pico_hybrids import HYBRIDS
from support.sample import TEN, crossed, sampled
from support.walking import MOVES, Propagation, prove

BATCHES = pico_tokens(24, 32).split(2)
FRESH = pico_tokens(8, 32, seed=1)


def pruned(
    reconstruction: Any,
    propagation: Propagation = "sequential",
    aims: bool = True,
    trainings: list[BlockTraining] | None = None,
) -> tuple[PreTrainedModel, list[MatrixResult]]:
    """Return a pico model at 2:4, reconstructed if requested; aims: whether dense states are kept only for used batches."""
    model = pico_model("llama")
    return model, prune_two_of_four(model, BATCHES, reconstruction, propagation, aims, trainings)


def prune_two_of_four(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    reconstruction: Reconstruction | None,
    propagation: Propagation = "block",
    aims: bool = True,
    trainings: list[BlockTraining] | None = None,
    **choice: Sequence[str],
) -> list[MatrixResult]:
    proven = prove(model, batches[0], **choice)
    recording = record_batches(proven, batches)
    trainings = [] if trainings is None else trainings
    solver = Solver(METHODS["wanda"])
    if reconstruction is not None:
        recording.dense = recording.hidden.copy()
        recording.aims = reconstruction.batches_used(recording.shares) if aims else None
    moves = replace(MOVES[propagation], keep_inputs=reconstruction is not None)  # type: ignore[arg-type]
    walk = Walk(proven, recording, solver.statistic, moves)

    def block_done(done: BlockDone, results: list[MatrixResult]) -> list[MatrixResult]:
        if reconstruction is None:
            return results
        results, training = reconstruct_block(reconstruction, done, recording, results, (), trainings)
        if training is not None:
            trainings.append(training)
        return results

    return prune_walk(walk, solver, lambda matrix: Target(NM(2, 4), 0.5), block_done=block_done)


def distance(model: PreTrainedModel) -> float:
    with torch.no_grad():
        dense, found = pico_model("llama")(FRESH).logits, model(FRESH).logits
    return float((found - dense).norm() / dense.norm())


@pytest.mark.parametrize(
    ("propagation", "changes"),
    [pytest.param("sequential", {}, marks=pytest.mark.slow), ("block", {"dtype": "bfloat16"})],
)
def test_reconstruction_lowers_the_error_and_keeps_zeros(propagation: Propagation, changes: dict[str, Any]) -> None:
    plain, before = pruned(None, propagation)
    trained, after = pruned(Reconstruction(steps=40, **changes), propagation)
    assert distance(trained) < distance(plain)
    first = [result.mask_checksum for result in before if result.name.startswith("model.layers.0.")]
    assert first == [result.mask_checksum for result in after if result.name.startswith("model.layers.0.")]
    for name, parameter in trained.named_parameters():
        if "_proj" in name:
            assert bool(((parameter != 0).unflatten(1, (-1, 4)).sum(dim=2) == 2).all()), name


def test_fine_tuning_uses_float32_on_a_processor_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Reconstruction(steps=4, dtype="bfloat16")
    monkeypatch.setattr("coprune.base.precision.multiplies_bfloat16", lambda _: False)
    (slow, _), (exact, _) = pruned(asked), pruned(replace(asked, dtype="float32"))
    assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), exact.parameters(), strict=True))
    monkeypatch.undo()
    monkeypatch.setattr("coprune.base.precision.multiplies_bfloat16", lambda _: True)
    half, _ = pruned(asked)
    assert not all(torch.equal(a, b) for a, b in zip(half.parameters(), exact.parameters(), strict=True))


@pytest.mark.parametrize("steps", [1, 3, pytest.param(30, marks=pytest.mark.slow)])
def test_reconstruction_needs_dense_states_of_used_batches_only(steps: int) -> None:
    reconstruction = Reconstruction(steps=steps)
    used = reconstruction.batches_used([1.0] * len(BATCHES))
    assert len(used) == min(steps, len(BATCHES) - 1) + 1
    with_all, _ = pruned(reconstruction, aims=False)
    with_few, _ = pruned(reconstruction)
    assert all(torch.equal(a, b) for a, b in zip(with_all.parameters(), with_few.parameters(), strict=True))


def test_a_block_made_worse_by_training_is_restored() -> None:
    trainings: list[BlockTraining] = []
    model, _ = pruned(Reconstruction(steps=2, learning_rate=1e3), trainings=trainings)
    plain, _ = pruned(None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(training.is_idle for training in trainings)


def test_the_rate_with_the_least_held_out_error_on_the_first_blocks_is_used() -> None:
    trainings: list[BlockTraining] = []
    pruned(Reconstruction(steps=6), trainings=trainings)
    first, *others = trainings
    ends = {}
    for rate in rates_to_try(Reconstruction(), []):
        alone: list[BlockTraining] = []
        pruned(Reconstruction(steps=6, learning_rate=rate), trainings=alone)
        ends[rate] = alone[0].end
    assert len(ends) == 3
    assert first.rate == min(ends, key=ends.__getitem__)
    assert first.end == min(ends.values())
    before = first
    for training in others:
        assert training.rate in (before.rate / 2, before.rate, 2 * before.rate)
        before = training


def test_rates_are_tried_until_settled_and_again_after_no_gain() -> None:
    asked = Reconstruction()
    start, half, double = rates_to_try(asked, [])
    assert (half, double) == (start / 2, 2 * start)
    gained = BlockTraining(block="0", start=1.0, end=0.5, rate=double, trained="")
    assert rates_to_try(asked, [gained]) == (double, start, 2 * double)
    assert rates_to_try(asked, [gained] * 3) == (double,)
    idle = gained.model_copy(update={"end": 1.0, "rate": half})
    assert rates_to_try(asked, [*[gained] * 3, idle]) == (half, half / 2, start)
    assert rates_to_try(Reconstruction(learning_rate=0.5), [idle]) == (0.5,), "what is asked for is not searched"


# Words in the names of other trained tensors, unless their layer is left alone.
NORMS_AND_BIASES = ("norm", "bias", "ln")
LEFT_ALONE = ("gate.", "router.", "conv", "rg_lru")
SHORT = Reconstruction(steps=3, learning_rate=1e-2)


def trained_by(family: str, dtype: torch.dtype) -> tuple[set[str], set[str], list[BlockTraining]]:
    """Prune and train a pico model; return the names of changed matrices and other tensors, and the trainings."""
    model = pico_model(family, dtype=dtype)
    dense = copy.deepcopy(model.state_dict())
    trainings: list[BlockTraining] = []
    results = prune_two_of_four(model, pico_tokens(4, 16).split(2), SHORT, trainings=trainings)
    assert all(result.sparsity == 0.5 for result in results)
    assert all(tensor.dtype == dense[name].dtype for name, tensor in model.state_dict().items())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, dense[name])}
    pruned = {result.name.partition("[")[0] for result in results}
    matrices = {name for name in changed if name.removesuffix(".weight") in pruned}
    return matrices, changed - matrices, trainings


@pytest.mark.parametrize("family", sampled([*FAMILIES, *MIXTURES, *HYBRIDS], quick=[*TEN, "qwen3_5_moe_text"]))
def test_half_precision_trains_pruned_matrices_norms_and_biases_in_every_family(family: str) -> None:
    matrices, others, trainings = trained_by(family, torch.bfloat16)
    assert matrices
    assert others
    assert all(any(word in name for word in NORMS_AND_BIASES) for name in others), others
    assert not any(word in name for name in others for word in LEFT_ALONE), others
    assert any(training.end < training.start for training in trainings)


@pytest.mark.parametrize(("family", "dtype"), crossed(["opt", "gpt_oss", "mixtral"], [torch.float16, torch.float32]))
def test_other_dtypes_train_the_same(family: str, dtype: torch.dtype) -> None:
    assert trained_by(family, dtype)[:2] == trained_by(family, torch.bfloat16)[:2]


def test_excluded_matrices_are_not_trained() -> None:
    model = pico_model("opt")
    dense = copy.deepcopy(model.state_dict())
    trainings: list[BlockTraining] = []
    prune_two_of_four(model, BATCHES[:3], SHORT, trainings=trainings, exclude=["*.v_proj", "*.layers.1.*"])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, dense[name])}
    # Neither the excluded block nor the excluded layer's bias.
    assert not any("v_proj" in name or ".layers.1." in name for name in changed)
    assert "model.decoder.layers.0.self_attn.q_proj.bias" in changed
    assert trainings[0].trained == (
        "self_attn.k_proj, self_attn.k_proj.bias, self_attn.q_proj, self_attn.q_proj.bias, self_attn.out_proj, "
        "self_attn.out_proj.bias, self_attn_layer_norm, self_attn_layer_norm.bias, fc1, fc1.bias, fc2, fc2.bias, "
        "final_layer_norm, final_layer_norm.bias"
    )


def test_only_the_chosen_experts_of_a_mixture_are_trained() -> None:
    model = pico_model("mixtral")
    dense = copy.deepcopy(model.state_dict())
    results = prune_two_of_four(model, BATCHES[:4], Reconstruction(steps=8), exclude=["*.experts.down_proj[[]2[]]"])
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(model.state_dict()[norm], dense[norm])  # so the block was trained
    experts = [name for name in dense if name.endswith("experts.down_proj")]
    chosen = {result.name for result in results}
    for name in experts:
        same = [torch.equal(a, b) for a, b in zip(model.state_dict()[name], dense[name], strict=True)]
        assert same == [f"{name}[{expert}]" not in chosen for expert in range(4)] == [False, False, True, False]
    routers = [name for name in dense if name.endswith("mlp.gate.weight")]
    assert routers
    assert all(torch.equal(model.state_dict()[name], dense[name]) for name in routers)


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"steps": 0}, {"learning_rate": -1.0}, {"held_out": -0.5}):
        with pytest.raises(BadInput):
            Reconstruction(**settings)
