"""A packed folder is a model like any other to the other commands."""

from __future__ import annotations

from pathlib import Path

import torch

from coprune.evaluation.perplexity import perplexity
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate
from coprune.model.opened import open_model
from coprune.packed.folder import pack
from coprune.recipe.parts import ModelPart
from support.pico import pico_model
from support.pico_hybrids import VOCABULARY
from support.words import word_tokenizer


def test_a_packed_folder_evaluates_to_the_bit_like_the_dense_one(tmp_path: Path) -> None:
    model = pico_model("llama")
    with torch.no_grad():
        for block in model.model.layers:
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.masked_fill_(torch.rand(parameter.shape) < 0.6, 0.0)
    model.save_pretrained(tmp_path / "dense")
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
