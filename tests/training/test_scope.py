"""The scope of a training: weights outside it stay unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.recipe.presets import preset_settings
from coprune.recipe.recipe import make_recipe
from coprune.recipe.views import training_recipe
from coprune.steps.train import training_of
from coprune.training.finetuning import run_finetuning
from support.pruned import pruned_model, save, settings_for, write_text

Tensors = dict[str, torch.Tensor]


def trained(folder: Path, model: Path, **changes: Any) -> tuple[Tensors, Tensors]:
    """Return the weights before and after a training."""
    asked = settings_for(
        folder, model, write_text(folder.parent / "text.txt", 700), **{"mode": "dense", "max_steps": 2, **changes}
    )
    run_finetuning(training_recipe(asked), Reporter(quiet=True))
    return load_file(model / "model.safetensors"), load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("scope", ["all", "blocks"])
@pytest.mark.parametrize("tied", [False, True])
def test_only_weights_in_the_scope_are_trained(tmp_path: Path, scope: str, tied: bool) -> None:
    save(pruned_model(num_hidden_layers=2, tie_word_embeddings=tied), tmp_path / "model")
    before, after = trained(tmp_path / "run", tmp_path / "model", train=[] if scope == "all" else scope)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    inside = {name for name in before if name.startswith("model.layers.")}
    assert len(inside) == 18
    assert ("lm_head.weight" in before) is not tied
    assert changed == (inside | {"model.norm.weight"} if scope == "blocks" else set(before))
    assert all(bool((after[name][tensor == 0] == 0).all()) for name, tensor in before.items())


def test_only_routers_are_trained_on_request(tmp_path: Path) -> None:
    save(pruned_model("qwen2_moe", num_hidden_layers=2), tmp_path / "model")
    before, after = trained(tmp_path / "run", tmp_path / "model", train="routers", learning_rate=0.01)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    routers = ("gate", "shared_expert_gate")
    assert changed == {f"model.layers.{layer}.mlp.{own}.weight" for layer in range(2) for own in routers}
    save(pruned_model(num_hidden_layers=1), tmp_path / "dense")
    with pytest.raises(BadInput, match="no mixture of experts, and so no router"):
        trained(tmp_path / "other", tmp_path / "dense", train="routers")


@pytest.mark.parametrize("mode", ["dense", "lora"])
def test_excluded_weights_stay_unchanged(tmp_path: Path, mode: str) -> None:
    save(pruned_model(num_hidden_layers=3), tmp_path / "model")
    exclude = ["*.q_proj", "model.layers.1.self_attn.*", "model.layers.1.mlp.*"]
    before, after = trained(tmp_path / "run", tmp_path / "model", mode=mode, exclude=exclude, learning_rate=0.01)
    alone = {name for name in before if "q_proj" in name or ".layers.1." in name}
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert not changed & alone
    assert {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 2)} <= changed
    assert "model.layers.1.input_layernorm.weight" in alone


@pytest.mark.parametrize(
    ("exclude", "message"), [("*.nope", "'\\*.nope' matches no parameter"), ("*", "nothing is left to train")]
)
def test_patterns_that_match_nothing_or_exclude_everything_are_refused(
    tmp_path: Path, exclude: str, message: str
) -> None:
    save(pruned_model(num_hidden_layers=1), tmp_path / "model")
    with pytest.raises(BadInput, match=message):
        trained(tmp_path / "run", tmp_path / "model", exclude=exclude)


@pytest.mark.parametrize("tied", [False, True])
def test_a_pruned_head_is_trained_too(tmp_path: Path, tied: bool) -> None:
    model = pruned_model(num_hidden_layers=1, tie_word_embeddings=tied)
    with torch.no_grad():
        head = model.lm_head.weight
        head[:, ::2] = 0
    save(model, tmp_path / "model")
    before, after = trained(tmp_path / "run", tmp_path / "model", train="blocks")
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert not torch.equal(before[name], after[name])
    assert bool((after[name][:, ::2] == 0).all())
    if not tied:
        assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_presets_train_blocks_and_adapters_choose_their_own_matrices() -> None:
    asked = {"model": "m", "pattern": "2:4"}
    weights = training_of(make_recipe(asked | preset_settings("balanced", asked, "whole")))
    assert (weights.train.scope, weights.train.rates, weights.train.mode) == ("blocks", "relative", "distill")
    asked |= {"finetune": "lora-distill"}
    adapters = training_of(make_recipe(preset_settings("balanced", asked, "whole") | asked))
    assert (adapters.train.scope, adapters.train.rates, adapters.train.mode) == ("all", "absolute", "lora-distill")
    assert adapters.train.rate == training_recipe({"model": "m", "mode": "lora-distill", "teacher": "m"}).train.rate
    assert adapters.train.tokens == weights.train.tokens
