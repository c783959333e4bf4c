"""GPTQ and AWQ: read as dense weights, and written as plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import coprune
from coprune.base.errors import BadInput
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.shards import read_tensor
from coprune.model.checkpoint.source_encoding import checkpoint_entries
from support.pico import pico_tokens
from support.quantised import quantised_pico


@pytest.mark.parametrize(
    ("form", "family"), [pytest.param("gptq", "llama", marks=pytest.mark.slow), ("awq", "qwen3_moe")]
)
def test_gptq_and_awq_prune_like_their_dense_weights(form: str, family: str, tmp_path: Path) -> None:
    quantised, dense = quantised_pico(tmp_path, form, family)
    own, plain = (
        load_model(ModelFolder(folder, "pico"), processed=False)[0].state_dict() for folder in (quantised, dense)
    )
    assert all(torch.equal(tensor, plain[name]) for name, tensor in own.items())
    made = []
    for source in (quantised, dense):
        saved = tmp_path / f"{source.name}-pruned"
        asked: dict[str, Any] = {"method": "magnitude", "sparsity": 0.5, "dataset": pico_tokens(4, 16), "stream": True}
        coprune.prune(
            source, **asked, save=tmp_path / f"{source.name}-run", save_model=saved, evaluate=False, quiet=True
        )
        made.append(load_file(saved / "model.safetensors"))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    assert "quantization_config" not in json.loads((tmp_path / "quantised-pruned" / "config.json").read_text())


@pytest.mark.parametrize(
    ("part", "said"),
    [("qzeros", r"scales and qzeros have the shapes .* which do not fit"), ("g_idx", r"q_proj: g_idx names group 99")],
)
def test_damaged_tensors_are_named(part: str, said: str, tmp_path: Path) -> None:
    quantised, _ = quantised_pico(tmp_path, "gptq", "llama")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    file = next(file for file in quantised.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name] = tensors[name][:-1] if part == "qzeros" else torch.full_like(tensors[name], 99)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=said):
        read_tensor(checkpoint_entries(quantised)["model.layers.0.self_attn.q_proj.weight"])


def test_unsupported_bit_widths_are_refused(tmp_path: Path) -> None:
    quantised, _ = quantised_pico(tmp_path, "gptq", "llama")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="gptq in 3 bits, which is not supported"):
        checkpoint_entries(quantised)
