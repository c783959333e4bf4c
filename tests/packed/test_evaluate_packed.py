"""A packed folder is a model like any other to the other commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from coprune.evaluation.evaluation import weight_facts
from coprune.evaluation.model_source import Held
from coprune.evaluation.perplexity import perplexity
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate
from coprune.model.loaded_model import open_model
from coprune.packed.accelerate import accelerate
from coprune.packed.folder import pack
from coprune.packed.linear import PackedLinear
from coprune.packed.quantizer import load_packed
from coprune.recipe.parts import ModelPart
from support.pico import pico_model
from support.pico_hybrids import VOCABULARY
from support.words import word_tokenizer


def test_a_packed_folder_evaluates_to_the_bit_like_the_dense_one(tmp_path: Path) -> None:
    model = half_zeros(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    tokens = torch.randint(VOCABULARY, (256,), generator=torch.Generator().manual_seed(1))
    values = []
    for name in ("dense", "packed"):
        loaded, _ = load_model(locate(tmp_path / name))
        values.append(perplexity(loaded, tokens, 32).value)
    assert values[0] == values[1]
    # Also where folders are streamed: this one is unpacked as a whole.
    opened = open_model(ModelPart(name=str(tmp_path / "packed")), stream=True)
    assert torch.equal(opened.model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def half_zeros(folder: Path) -> PreTrainedModel:
    """A pico model with zeros, and the same in a folder."""
    model = pico_model("llama")
    with torch.no_grad():
        for block in model.model.layers:
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.masked_fill_(torch.rand(parameter.shape) < 0.6, 0.0)
    model.save_pretrained(folder)
    return model


def test_packed_layers_in_memory_count_as_what_they_hold(tmp_path: Path) -> None:
    model = half_zeros(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    kept = load_packed(tmp_path / "packed")
    assert weight_facts(kept, 0) == weight_facts(model, 0)
    embedded = model.get_parameter("model.embed_tokens.weight")
    assert embedded.numel() * 4 < Held(kept, None).bytes_of_weights() < Held(model, None).bytes_of_weights()


def test_an_accelerated_model_is_saved_as_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = half_zeros(tmp_path / "dense"), torch.arange(8)[None]
    expected = model(tokens).logits
    monkeypatch.setattr("coprune.packed.accelerate.WORTH_IT", 0.0)
    monkeypatch.setattr("coprune.packed.accelerate._forms", lambda *_: {"packed": PackedLinear.from_linear})
    assert any(choice.kind == "packed" for choice in accelerate(model, repeats=1))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(tokens).logits, expected)
    assert torch.equal(load_packed(tmp_path / "saved")(tokens).logits, model(tokens).logits)
