"""What a run that prunes and trains hands from one half to the other, and gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import coprune
from coprune.base.errors import BadInput
from coprune.recipe.recipe import make_recipe
from coprune.training.after_pruning import pruning_of, settings_of
from coprune.training.masks import find_masks
from support.pico import pico_model
from support.pruned import save, write_text
from support.words import word_tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    save(pico_model("llama", vocab_size=1002, num_hidden_layers=2), folder)
    return folder


def test_a_pruning_hands_on_how_it_is_trained() -> None:
    how: dict[str, Any] = {"finetune_tokens": 4096, "finetune_lr": 2e-4, "finetune_accumulate": 2}
    recipe = make_recipe({"model": "m", "finetune": "distill", "finetune_dtype": "bfloat16", **how})
    found = settings_of(recipe)
    assert (found.tokens, found.rate, found.accumulate, found.bf16) == (4096, 2e-4, 2, True)
    assert found.teacher == "m"
    alone = pruning_of(recipe).finetune
    assert alone == type(alone)()


def test_a_model_in_memory_is_trained_but_is_no_teacher_of_itself(tmp_path: Path) -> None:
    model = pico_model("llama", vocab_size=1002, num_hidden_layers=2)
    small: dict[str, Any] = {"pattern": "2:4", "seqlen": 16, "nsamples": 2, "evaluate": False, "gate": False}
    small |= {"dataset": str(write_text(tmp_path / "text.txt", 700)), "tokenizer": word_tokenizer(), "quiet": True}
    with pytest.raises(BadInput, match="in memory alone; name the model's folder, or use finetune='dense'"):
        coprune.prune(model, finetune="distill", save=tmp_path / "distilled", **small)
    assert not (tmp_path / "distilled").exists()
    found = coprune.prune(model, finetune="dense", finetune_tokens=32, save=tmp_path / "run", **small)
    assert found.report.finetuned is not None
    assert found.model is not model


def test_the_strongest_preset_trains_and_hands_its_model_back(dense: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"seqlen": 16, "nsamples": 4, "device": "cpu", "evaluate": False, "gate": False}
    few: dict[str, Any] = {"finetune_tokens": 65}
    result = coprune.prune(
        str(dense),
        preset="max",
        pattern="2:4",
        dataset=str(write_text(tmp_path / "text.txt", 700)),
        save=tmp_path / "run",
        quiet=True,
        **small,
        **few,
    )
    assert result.report.finetuned is not None
    assert (result.report.finetuned.mode, result.report.finetuned.steps) == ("distill", 5)
    assert result.report.saved_model == tmp_path / "run" / "finetune" / "model"
    assert result.model is not None
    assert find_masks(result.model).patterns == {"2:4": 14}
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "pruned")
    trained = result.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(trained, pruned.model.layers[0].mlp.up_proj.weight)
    assert result.tokenizer is not None
