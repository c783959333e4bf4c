"""Blocks that hold the same weights: these are left alone, and everything else is pruned and saved as usual."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import coprune
from coprune.base.errors import UnsupportedModel
from coprune.model.bare_configuration import Imagined
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.weights import InMemory, Weights
from coprune.model.loaded_model import Loaded
from coprune.model.matrix_choice import choose_matrices
from coprune.model.walk.model_structure import FoundModel
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver
from coprune.recipe.pattern import Target, parse_pattern
from coprune.run.memory_bound import Shapes
from support.pico import pico_model, pico_tokens
from support.pico_folder import save_pico
from support.walking import share_of_different_entries
from support.whole import differences
from support.whole_forwards import kind_of, prune_by_whole_forwards

BATCHES = pico_tokens(12, 32).split(4)
SHARED = "model.layers.1.shared_transformer."


def test_all_but_the_shared_weights_is_pruned_by_what_it_really_meets() -> None:
    model, oracle = pico_model("zamba2"), pico_model("zamba2")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = coprune.prune(model, "wanda", dataset=torch.cat(BATCHES), batch_size=4, evaluate=False, quiet=True).report
    alone = {layers.kind for layers in report.left_out}
    expected = prune_by_whole_forwards(oracle, BATCHES, Target(parse_pattern("unstructured"), 0.5), alone)
    assert {kind_of(SHARED) + "self_attn.q_proj", kind_of(SHARED) + "feed_forward.down_proj"} <= alone
    assert {matrix.name for matrix in report.matrices} == expected.keys()
    found = {name: model.get_parameter(f"{name}.weight") != 0 for name in expected}
    assert share_of_different_entries(found, expected) < 1e-3
    for name, tensor in model.state_dict().items():
        assert name.removesuffix(".weight") in expected or torch.equal(tensor, dense[name])


@pytest.mark.parametrize("reconstruct", [0, 3])
def test_a_folder_keeps_them_once_and_to_the_bit(reconstruct: int, tmp_path: Path) -> None:
    save_pico(tmp_path / "source", "zamba2")
    for stream in (True, False):
        coprune.prune(
            tmp_path / "source",
            "wanda",
            dataset=torch.cat(BATCHES),
            batch_size=4,
            evaluate=False,
            quiet=True,
            reconstruct=reconstruct,
            stream=stream,
            save_model=tmp_path / str(stream),
        )
    source, saved = (_tensors(tmp_path / name) for name in ("source", "True"))
    shared = {name for name in source if name.startswith(SHARED)}
    assert source.keys() == saved.keys()
    assert all(torch.equal(source[name], saved[name]) for name in shared)
    assert not any(name.startswith("model.layers.3.shared") for name in saved)
    assert not differences(tmp_path / "True", tmp_path / "False").changed


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_block_that_is_read_back_gives_the_others_what_they_share(tmp_path: Path) -> None:
    model = pico_model("zamba2")
    weights = InMemory(model)
    tensors = weights.original_tensors("model.layers.1")
    save_file({name: (2 * tensor).contiguous() for name, tensor in tensors.items()}, tmp_path / "block.safetensors")
    weights.read_from(tmp_path / "block.safetensors")
    first, other = (model.model.layers[number].shared_transformer.self_attn.q_proj.weight for number in (1, 3))
    assert first is other
    assert torch.equal(first, 2 * tensors[f"{SHARED}self_attn.q_proj.weight"])


def test_a_configuration_alone_shows_them_and_the_memory_holds_them(tmp_path: Path) -> None:
    place = ModelFolder(save_pico(tmp_path / "source", "zamba2"), "source")
    lazy = LazyCheckpoint(place)
    lazy.acquire_rest([block.name for block in find_blocks(lazy.model)])
    shapes = [_shapes(weights) for weights in (Imagined(place, "auto", torch.device("cpu")), lazy)]
    assert shapes[0] == shapes[1]
    assert shapes[0].rest_bytes == sum(one.nbytes for one in lazy.model.parameters() if not one.is_meta)


def _shapes(weights: Weights) -> Shapes:
    blocks = find_blocks(weights.model)
    found = FoundModel(weights, blocks, choose_matrices(weights.model, blocks))
    return Shapes.of(Loaded(weights, None, "source", False), found, Solver(METHODS["wanda"]), removes=False)


@pytest.mark.parametrize("parts", ["blocks=0.25", "channels=0.25"])
def test_parts_of_them_are_not_removed(parts: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"shared_transformer\S+ is in several blocks"):
        coprune.prune(pico_model("zamba2"), dataset=torch.cat(BATCHES), remove=parts, evaluate=False, quiet=True)
