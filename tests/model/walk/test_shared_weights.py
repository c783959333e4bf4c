"""Weights shared by blocks: pruned once, first, on the inputs of all these blocks, and saved once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import coprune
from coprune.base.errors import UnsupportedModel
from coprune.model.bare_configuration import Imagined
from coprune.model.blocks import Block, find_blocks
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.weights import InMemory, Weights
from coprune.model.loaded_model import Loaded
from coprune.model.matrix_choice import choose_matrices
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.model.walk.model_structure import FoundModel
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver
from coprune.recipe.pattern import Target, parse_pattern
from coprune.run import shared_weights
from coprune.run.memory_bound import Shapes
from coprune.run.output import Output
from coprune.steps import prune as prune_blocks
from support.pico import pico_model, pico_tokens
from support.pico_folder import save_pico
from support.walking import (
    Propagation,
    Solve,
    inputs_by_full_forwards,
    layers_of,
    prune_shared_with_full_forwards,
    share_of_different_entries,
    wanda_as_published,
)
from support.whole import differences

HALF = Target(parse_pattern("unstructured"), 0.5)
BATCHES = pico_tokens(12, 32).split(4)
SHARED = "model.layers.1.shared_transformer."


def _solve(method: str) -> Solve:
    if method == "wanda":
        return wanda_as_published(HALF)
    solver = Solver(METHODS[method])

    def solve(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert solver.statistic is not None
        inputs = Inputs(solver.statistic(x.shape[1]), InputSample(x.shape[1], 1))
        inputs.update(x)
        return solver.solve(weight, inputs, HALF).weight

    return solve


@torch.no_grad()
def _by_whole_forwards(model: PreTrainedModel, solve: Solve, propagation: Propagation) -> dict[str, torch.Tensor]:
    """Prune the model in place, first the shared weights on all their inputs; return the kept weights of each matrix."""
    blocks = [layers_of(block) for block in find_blocks(model)]
    dense = inputs_by_full_forwards(model, [layer for layers in blocks for layer in layers], BATCHES)
    shared = prune_shared_with_full_forwards(model, BATCHES, solve)
    for layers in blocks:
        own = {layer.name: layer for layer in layers if layer.name not in shared}
        inputs = dense if propagation == "dense" else inputs_by_full_forwards(model, [*own.values()], BATCHES)
        for name in [name for name in inputs if name in own]:
            if propagation == "sequential":
                inputs |= inputs_by_full_forwards(model, [own[name]], BATCHES)
            own[name].weight.copy_(solve(own[name].weight, inputs[name]))
    pruned = (layer for layers in blocks for layer in layers if shared.get(layer.name, layer.name) == layer.name)
    return {layer.name: layer.weight != 0 for layer in pruned}


@pytest.mark.parametrize(
    ("method", "propagation"),
    [("wanda", "block"), ("wanda", "sequential"), ("wanda", "dense"), ("sparsegpt", "block")],
)
def test_shared_weights_are_pruned_on_the_inputs_of_all_blocks(method: str, propagation: Propagation) -> None:
    model, oracle = pico_model("zamba2"), pico_model("zamba2")
    settings: dict[str, Any] = {"batch_size": 4, "evaluate": False, "quiet": True, "propagation": propagation}
    report = coprune.prune(model, method, dataset=torch.cat(BATCHES), **settings).report
    expected = _by_whole_forwards(oracle, _solve(method), propagation)
    assert {f"{SHARED}self_attn.q_proj", f"{SHARED}feed_forward.down_proj"} <= expected.keys()
    assert {matrix.name for matrix in report.matrices} == expected.keys()
    assert {matrix.name: matrix.tokens for matrix in report.matrices}[f"{SHARED}self_attn.q_proj"] == 2 * 12 * 32
    found = {name: model.get_parameter(f"{name}.weight") != 0 for name in expected}
    assert share_of_different_entries(found, expected) < 1e-3
    first, other = (model.model.layers[number].shared_transformer.self_attn.q_proj.weight for number in (1, 3))
    assert first is other


def test_blocks_are_trained_toward_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense, aims = pico_model("zamba2"), pico_model("zamba2"), list[torch.Tensor]()

    def note(reconstruction: Any, done: BlockDone, *others: Any) -> Any:
        aims.append(done.after[0])
        return others[1], None

    monkeypatch.setattr(prune_blocks, "reconstruct_block", note)
    settings: dict[str, Any] = {"batch_size": 4, "evaluate": False, "quiet": True, "reconstruct": 3}
    coprune.prune(model, "wanda", dataset=torch.cat(BATCHES), **settings)
    hidden = dense(input_ids=BATCHES[0], use_cache=False, output_hidden_states=True).hidden_states
    assert len(aims) == 4
    for aim, expected in zip(aims[:3], hidden[1:], strict=False):
        torch.testing.assert_close(aim, expected)


@pytest.mark.parametrize(
    "more", [{"reconstruct": 3}, pytest.param({"propagation": "dense", "allocation": "owl"}, marks=pytest.mark.slow)]
)
def test_shared_weights_are_saved_once(more: dict[str, Any], tmp_path: Path) -> None:
    save_pico(tmp_path / "source", "zamba2")
    for stream in (True, False):
        report = coprune.prune(
            tmp_path / "source",
            "wanda",
            dataset=torch.cat(BATCHES),
            batch_size=4,
            evaluate=False,
            quiet=True,
            stream=stream,
            save_model=tmp_path / str(stream),
            **more,
        ).report
        assert report.sparsity.matrices == pytest.approx(0.5, abs=2e-3)
    source, saved = (_tensors(tmp_path / name) for name in ("source", "True"))
    assert source.keys() == saved.keys()
    assert not any(name.startswith("model.layers.3.shared") for name in saved)
    queries = f"{SHARED}self_attn.q_proj.weight"
    assert int((saved[queries] == 0).sum()) == source[queries].numel() // 2
    assert torch.equal(saved[queries], source[queries] * (saved[queries] != 0))
    assert not differences(tmp_path / "True", tmp_path / "False").changed
    assert not list((tmp_path / "True").glob("shared*"))


@pytest.mark.parametrize("damaged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resumed_run_prunes_shared_weights_again_only_if_damaged(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, looks = save_pico(tmp_path / "source", "zamba2"), list[str]()
    look, write = shared_weights.inputs_of_shared, Output.write_block

    def run(name: str) -> None:
        settings: dict[str, Any] = {"evaluate": False, "quiet": True, "propagation": "dense", "stream": True}
        coprune.prune(source, "wanda", dataset=BATCHES[0], save_model=tmp_path / name, **settings)

    def noted(*given: Any) -> Any:
        looks.append("look")
        return look(*given)

    def interrupted(self: Output, block: Block, outcome: Any) -> None:
        if block.index == 2:
            raise KeyboardInterrupt
        write(self, block, outcome)

    monkeypatch.setattr(shared_weights, "inputs_of_shared", noted)
    run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    file = tmp_path / ".parts.partial" / "shared.safetensors"
    if damaged:
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    run("parts")
    assert len(looks) == 2 + damaged
    assert not differences(tmp_path / "whole", tmp_path / "parts").changed


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_restoring_a_block_updates_shared_weights_in_others(tmp_path: Path) -> None:
    model = pico_model("zamba2")
    weights = InMemory(model)
    tensors = weights.original_tensors("model.layers.1")
    save_file({name: (2 * tensor).contiguous() for name, tensor in tensors.items()}, tmp_path / "block.safetensors")
    weights.read_from(tmp_path / "block.safetensors")
    first, other = (model.model.layers[number].shared_transformer.self_attn.q_proj.weight for number in (1, 3))
    assert first is other
    assert torch.equal(first, 2 * tensors[f"{SHARED}self_attn.q_proj.weight"])


def test_shared_weights_are_counted_from_the_configuration_alone(tmp_path: Path) -> None:
    place = ModelFolder(save_pico(tmp_path / "source", "zamba2"), "source")
    lazy = LazyCheckpoint(place)
    lazy.acquire_rest([block.name for block in find_blocks(lazy.model)])
    shapes = [_shapes(weights) for weights in (Imagined(place, "auto", torch.device("cpu")), lazy)]
    assert shapes[0] == shapes[1]
    assert 0 < shapes[0].shared_weights < shapes[0].rest_bytes
    assert shapes[0].shared > shapes[0].statistics
    assert shapes[0].rest_bytes == sum(one.nbytes for one in lazy.model.parameters() if not one.is_meta)


def _shapes(weights: Weights) -> Shapes:
    blocks = find_blocks(weights.model)
    found = FoundModel(weights, blocks, choose_matrices(weights.model, blocks))
    return Shapes.of(Loaded(weights, None, "source", False), found, Solver(METHODS["wanda"]), removes=False)


@pytest.mark.parametrize("parts", ["blocks=0.25", "channels=0.25"])
def test_removing_parts_of_shared_weights_is_refused(parts: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"shared_transformer\S+ is in several blocks"):
        coprune.prune(pico_model("zamba2"), dataset=torch.cat(BATCHES), remove=parts, evaluate=False, quiet=True)
