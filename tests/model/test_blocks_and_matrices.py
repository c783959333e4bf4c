"""Blocks are found by structure, matrices are views, and patterns select among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.model.blocks import find_blocks
from coprune.model.matrices import find_matrices
from coprune.model.matrix_choice import choose_matrices
from coprune.model.walk.block_calls import TensorPool, same_value, snapshot
from coprune.model.walk.observe import Observe
from support.pico import FAMILIES, MIXTURES, pico_model
from support.sample import of_ten
from support.toys import ToyModel


@pytest.mark.parametrize("family", of_ten(FAMILIES | MIXTURES))
def test_blocks_of_every_family_are_found(family: str) -> None:
    model = pico_model(family)
    blocks = find_blocks(model)
    assert len(blocks) == (model.config.num_hidden_layers)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert all(model.get_submodule(block.name) is block.module for block in blocks)


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_an_encoder_decoder_has_two_lists_of_blocks() -> None:
    model = ToyModel()
    model.encoder = ToyModel().layers
    with pytest.raises(UnsupportedModel, match="more than one long list"):
        find_blocks(model)


def test_a_list_within_the_only_block_is_not_the_list_of_blocks() -> None:
    model = ToyModel(blocks=1)
    model.layers[0].experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
    assert [block.name for block in find_blocks(model)] == ["layers.0"]


class Fused(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))


@settings(deadline=None, max_examples=20)
@given(kind=st.sampled_from(["linear", "conv1d", "fused", "transposed"]), seed=st.integers(0, 99), half=st.booleans())
def test_values_written_to_a_matrix_are_read_back(kind: str, seed: int, half: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, nn.Module] = {"linear": nn.Linear(6, 4), "conv1d": Conv1D(4, 6)}
    module = made.get(kind) or Fused(kind == "transposed")
    module.to(torch.bfloat16 if half else torch.float32)
    matrices = list(find_matrices(module, "here"))
    assert len(matrices) == (3 if kind in ("fused", "transposed") else 1)
    others = {m.name: m.read() for m in matrices[1:]}
    matrix = matrices[0]
    assert matrix.shape == ((6, 4) if kind == "fused" else (4, 6))
    weight = torch.randn(matrix.shape, generator=generator).to(torch.bfloat16).float()
    weight[torch.rand(matrix.shape, generator=generator) < 0.5] = 0
    assert matrix.zeros() == 0
    before = matrix.mask_checksum()
    matrix.write(weight)
    assert torch.equal(matrix.read(), weight)
    assert matrix.zeros() == int((weight == 0).sum())
    assert (matrix.mask_checksum() == before) == (matrix.zeros() == 0)
    assert all(torch.equal(m.read(), others[m.name]) for m in matrices[1:])
    matrix.read().zero_()  # a copy
    assert torch.equal(matrix.read(), weight)


def names(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    return [matrix.name for matrix in choose_matrices(model, find_blocks(model), include, exclude).all()]


def test_patterns_select_matrices() -> None:
    model = pico_model("mixtral", num_hidden_layers=2)
    everything = names(model)
    assert len(everything) == 2 * (4 + 2 * 4)
    assert names(model, ["*.q_proj"]) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert names(model, ["*.1.*down_proj[[]2]"]) == ["model.layers.1.mlp.experts.down_proj[2]"]
    assert len(names(model, ["*.experts.down_proj"])) == 8
    assert names(model, [], ["*.experts.*"]) == [name for name in everything if "experts" not in name]
    assert not any("gate_up" not in name and ".gate" in name for name in everything)


def test_the_head_is_left_alone_unless_named() -> None:
    model = ToyModel()
    assert "head" not in names(model)
    assert names(model, ["*"]) == names(model)
    assert names(model, ["head"]) == ["head"]
    assert names(model, ["layers.*", "head"])[-1] == "head"


def test_a_head_tied_to_the_embeddings_is_refused() -> None:
    model = pico_model("llama", tie_word_embeddings=True)
    with pytest.raises(BadInput, match="shares its weights with the embeddings"):
        names(model, ["lm_head"])


@pytest.mark.parametrize(("include", "exclude"), [(["*.nothing"], []), ([], ["*.nothing"])])
def test_a_pattern_that_matches_nothing_is_refused(include: list[str], exclude: list[str]) -> None:
    with pytest.raises(BadInput, match=r"'\*\.nothing' matches none"):
        names(ToyModel(), include, exclude)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: nn.functional.linear(x, w),
    "linear by keyword": lambda x, w: nn.functional.linear(input=x, weight=w),
    "matmul of the transpose": lambda x, w: torch.matmul(x, w.T),
    "operator": lambda x, w: x @ w.T,
    "method": lambda x, w: x.matmul(w.t()),
    "mm": lambda x, w: torch.mm(x, w.T),
    "addmm": lambda x, w: torch.addmm(torch.zeros(4), x, w.T),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_form_of_product_is_observed(product: str) -> None:
    module = nn.Linear(6, 4, bias=False)
    x, seen = torch.randn(5, 6), []
    with Observe(list(find_matrices(module, "it")), lambda matrix, inputs: seen.append((matrix.name, inputs))):
        out = PRODUCTS[product](x, module.weight)
    assert [name for name, _ in seen] == ["it"]
    assert seen[0][1] is x
    assert torch.allclose(out, x @ module.weight.T)


def test_unrelated_products_are_ignored_and_a_wrong_direction_is_refused() -> None:
    module = nn.Linear(4, 4, bias=False)
    matrices, seen = list(find_matrices(module, "it")), []
    with Observe(matrices, lambda matrix, inputs: seen.append(matrix)):
        _ = torch.randn(3, 4) @ torch.randn(4, 4)
        _ = torch.randn(3, 2) @ module.weight[:2]
    assert not seen
    with pytest.raises(UnsupportedModel, match="it is multiplied along its outputs"), Observe(matrices, print):
        _ = torch.randn(3, 4) @ module.weight


def test_recorded_arguments_are_snapshots_and_compare_by_value() -> None:
    tensor = torch.arange(4.0)
    value: dict[str, Any] = {"a": [1, (tensor, None)], "b": True}
    copy = snapshot(value)
    value["a"].append(2)
    assert same_value(copy, {"a": [1, (tensor.clone(), None)], "b": True})
    assert not same_value(copy, value)
    assert not same_value(copy, {"a": [1, (tensor + 1, None)], "b": True})
    assert not same_value(tensor, tensor.double())
    assert not same_value(1, 1.0)
    assert same_value(object(), object())


def test_equal_tensors_are_kept_once() -> None:
    pool = TensorPool()
    first = pool.share({"mask": torch.ones(3), "more": [torch.zeros(3), 5]})
    pool.forget_batch()
    second = pool.share({"mask": torch.ones(3), "more": [torch.zeros(3), 5]})
    assert second["mask"] is first["mask"]
    assert second["more"][0] is first["more"][0]
    assert second["more"][1] == 5
    assert pool.share(torch.ones(3) * 2) is not first["mask"]


def test_a_model_configured_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="the model has no blocks: its configuration sets their number to 0"):
        find_blocks(pico_model("llama", num_hidden_layers=0))
