"""Runs that add matrices of low rank: everybody sees the sum, and what is saved is that sum in two folders."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import coprune
from coprune.base.errors import BadInput, VerificationError
from coprune.model.adapter_folder import verify_adapter, write_adapter
from coprune.model.edits import Edits
from coprune.model.low_rank_factors import Factors, factors_below, give, take_away, without_factors
from coprune.model.matrices import find_matrices
from coprune.recipe.parts import Decides
from coprune.recipe.recipe import make_recipe
from support.pico import pico_model, pico_tokens
from support.pico_folder import save_pico, write_words
from support.saved import tensors_of

TOKENS = pico_tokens(2, 24, seed=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for family in ("llama", "gpt2", "mixtral"):
        save_pico(folder / family, family)
    write_words(folder / "words.txt")
    write_words(folder / "test.txt", count=100, seed=1)
    return folder


def settings(place: Path, **more: Any) -> dict[str, Any]:
    data = {"dataset": str(place / "words.txt"), "eval_data": str(place / "test.txt"), "eval_tokens": 64}
    return {**data, "nsamples": 4, "seqlen": 32, "prompt": "", "quiet": True, "pattern": "2:4", "low_rank": 4, **more}


@contextmanager
def peft_as_it_is() -> Iterator[None]:
    """PEFT still asks transformers for properties by names that are on their way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def turn_off(model: Any) -> None:
    """Let the layers of a model do without their adapters."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("family", "method", "propagation"),
    [
        ("llama", "sparsegpt", "sequential"),
        pytest.param("llama", "wanda", "block", marks=pytest.mark.slow),
        pytest.param("gpt2", "sparsegpt", "sequential", marks=pytest.mark.slow),
        ("mixtral", "wanda", "dense"),
    ],
)
def test_what_is_saved_is_the_sum_in_memory(
    family: str, method: str, propagation: Any, place: Path, tmp_path: Path
) -> None:
    asked = settings(place, propagation=propagation)
    result = coprune.prune(place / family, method, save_model=tmp_path / "pruned", **asked)
    streamed = coprune.prune(place / family, method, save_model=tmp_path / "streamed", stream=True, **asked)
    adapter = tmp_path / "pruned" / "adapter"
    alone, whole = loaded(tmp_path / "pruned"), loaded(tmp_path / "pruned")
    with peft_as_it_is():
        whole.load_adapter(str(adapter))
        peft = PeftModel.from_pretrained(loaded(tmp_path / "pruned"), str(adapter))
    expected = logits(whole)
    assert torch.equal(expected, logits(peft))
    assert torch.equal(expected, logits(result.model))
    assert (expected - logits(alone)).abs().max() > 0.1
    turn_off(result.model)
    assert torch.equal(logits(alone), logits(result.model))
    # The base is what its name says: zeros of the pattern, in the shapes and names of the source.
    base, source = tensors_of(tmp_path / "pruned"), tensors_of(place / family)
    assert {name: tensor.shape for name, tensor in base.items()} == {name: t.shape for name, t in source.items()}
    masks = Edits.read(tmp_path / "pruned").checksums()
    assert masks == {m.name: m.mask_checksum() for m in find_matrices(alone) if m.name in masks}
    assert masks == {m.name: m.mask_checksum for m in result.report.matrices}
    assert all(torch.equal(base[name], tensor) for name, tensor in tensors_of(tmp_path / "streamed").items())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "streamed" / "adapter" / file).read_bytes() == (adapter / file).read_bytes()
    assert streamed.report.low_rank == result.report.low_rank


def test_later_blocks_see_the_sum(place: Path) -> None:
    whole = coprune.prune(place / "llama", "sparsegpt", **settings(place, propagation="sequential"))
    own = coprune.prune(place / "llama", "sparsegpt", **settings(place, propagation="sequential", low_rank=0))
    by_name = {matrix.name: matrix for matrix in own.report.matrices}
    for matrix in whole.report.matrices:
        assert matrix.rank == 4
        error, alone = matrix.relative_layer_error, by_name[matrix.name].relative_layer_error
        assert error is not None
        assert alone is not None
        assert error < alone
    # What the second block's matrices were multiplied with, computed by nothing but the model that came out.
    seen: list[Tensor] = []
    model: Any = whole.model
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    texts = torch.tensor([[int(word[1:]) for word in (place / "words.txt").read_text().split()[:32]]])
    with torch.no_grad():
        model(texts)
        turn_off(model)
        model(texts)
    handle.remove()
    assert (seen[0] - seen[1]).abs().max() > 0.01


def test_the_report_counts_what_is_added(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = coprune.prune(place / "llama", "wanda", save_model=tmp_path / "pruned", **settings(place))
    facts, matrices = result.report.low_rank, result.report.matrices
    assert facts is not None
    stored = load_file(tmp_path / "pruned" / "adapter" / "adapter_model.safetensors")
    assert facts.matrices == len(matrices) == len(stored) // 2
    assert facts.parameters == sum(tensor.numel() for tensor in stored.values())
    assert facts.adapter_bytes == 4 * facts.parameters
    assert facts.base_bytes == 4 * result.report.model.parameters
    weights = sum(rows * width for rows, width in (matrix.shape for matrix in matrices))
    # Of every four values two are stored, with two bits each for their places.
    assert facts.sparse_bytes == weights // 4 * 2 * (32 + 2) // 8 + 4 * (result.report.model.parameters - weights)
    assert facts.effective_sparsity == pytest.approx(0.5 - facts.parameters / weights)
    assert facts.left_out == {}
    assert not caplog.records
    alone = coprune.evaluate(tmp_path / "pruned", **_measured(place)).perplexity[0].value
    left_out = f"{tmp_path / 'pruned' / 'adapter'} is left out: {tmp_path / 'pruned'} is read without it"
    assert [record.getMessage() for record in caplog.records] == [left_out]
    assert facts.alone == pytest.approx({str(place / "test.txt"): alone}, rel=1e-5)
    assert result.report.perplexity[0].pruned != pytest.approx(alone, rel=1e-3)
    assert facts.line() in str(result.report)
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "An adapter of rank 4 for 21 of these matrices" in card
    assert 'model.load_adapter("PATH OF THIS FOLDER/adapter")' in card


def _measured(place: Path) -> dict[str, Any]:
    return {"eval_data": str(place / "test.txt"), "eval_tokens": 64, "seqlen": 32, "quiet": True}


def test_experts_that_share_a_parameter_are_left_out_by_name(place: Path, tmp_path: Path) -> None:
    result = coprune.prune(place / "mixtral", "sparsegpt", save_model=tmp_path / "pruned", **settings(place))
    facts = result.report.low_rank
    assert facts is not None
    experts = [
        f"model.layers.{block}.mlp.experts.{name}" for block in range(3) for name in ("gate_up_proj", "down_proj")
    ]
    assert facts.left_out == dict.fromkeys(experts, "experts that share a parameter get no adapter of PEFT")
    config = json.loads((tmp_path / "pruned" / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(m.name for m in result.report.matrices if m.rank)
    assert all("experts" not in name for name in config["target_modules"])
    with pytest.raises(BadInput, match="no pruned matrix can get low-rank factors"):
        coprune.prune(place / "mixtral", "sparsegpt", include="*experts*", **settings(place))


def test_a_trained_block_keeps_what_was_added(place: Path) -> None:
    asked = settings(place, propagation="sequential", reconstruct=20)
    plain = coprune.prune(place / "llama", "sparsegpt", **asked | {"low_rank": 0}).report
    both = coprune.prune(place / "llama", "sparsegpt", **asked).report
    assert len(both.trainings) == len(plain.trainings) == 3
    for with_rank, without in zip(both.trainings, plain.trainings, strict=True):
        assert with_rank.end <= with_rank.start
        assert with_rank.end < without.end


def test_half_precision_is_what_peft_computes(place: Path, tmp_path: Path) -> None:
    asked = settings(place, dtype="bfloat16", propagation="sequential")
    result = coprune.prune(place / "llama", "sparsegpt", save_model=tmp_path / "pruned", **asked)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.bfloat16)
    with peft_as_it_is():
        whole.load_adapter(str(tmp_path / "pruned" / "adapter"))
    stored = load_file(tmp_path / "pruned" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert (logits(whole) - logits(result.model)).abs().max() <= 0.02 * logits(whole).abs().max()


def test_layers_add_and_stop_adding() -> None:
    model: Any = pico_model("gpt2")
    before, name = logits(model), "transformer.h.1.mlp.c_fc"
    layer = model.get_submodule(name)
    rows, width = layer.weight.shape[::-1]
    factors = Factors(torch.randn(rows, 2), torch.randn(2, width))
    give(model, {name: factors})
    assert factors_below(model) == {name: factors}
    whole = logits(model)
    assert (whole - before).abs().max() > 0.1
    with without_factors(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), whole)
    assert take_away(model) == {name: factors}
    assert torch.equal(logits(model), before)
    assert "forward" not in layer.__dict__
    with torch.no_grad():
        layer.weight.add_(factors.product().T)
    assert torch.allclose(logits(model), whole, atol=1e-3)


def test_a_damaged_adapter_is_found(tmp_path: Path) -> None:
    model: Any = pico_model("llama")
    name = "model.layers.0.mlp.up_proj"
    rows, width = model.get_submodule(name).weight.shape
    factors = {name: Factors(torch.randn(rows, 2), torch.randn(2, width))}
    write_adapter(tmp_path / "adapter", model, factors)
    verify_adapter(tmp_path / "adapter", factors)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{name}.lora_A.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(VerificationError, match=f"the saved factors of {name}"):
        verify_adapter(tmp_path / "adapter", factors)


def test_a_recipe_with_a_rank_is_another_run_in_another_folder() -> None:
    recipe = make_recipe({"model": "models/pico", "pattern": "2:4", "low_rank": {"rank": 32}})
    assert recipe.deciding(Decides.RESULT)["low_rank"] == 32
    assert recipe.run_folder == Path("out/pico/2-4-rank-32/wanda")
    assert recipe.shape == "2:4, rank 32 added"
    assert make_recipe({"model": "models/pico"}).prune.low_rank.rank == 0
