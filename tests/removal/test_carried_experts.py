"""Experts of layers that no class loads, for speculative decoding, are removed like those of the blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coprune.base.progress import Reporter
from coprune.model.removed import CarriedExperts
from coprune.recipe.recipe import make_recipe
from coprune.runner.run_recipe import run_recipe
from support.pico_folder import save_pico, write_words

TABLES = ("gate_up_proj", "down_proj")
SPLIT = ("gate_proj", "up_proj", "down_proj")


def carry(folder: Path, stacked: bool) -> dict[str, Tensor]:
    """Add a layer for speculative decoding beside a mixture's blocks: a copy of the first, with two unspecialised experts."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    first = "model.layers.0."
    found = {f"mtp.layers.0.{n.removeprefix(first)}": t.clone() for n, t in tensors.items() if n.startswith(first)}
    for number in (0, 7):  # all their weights have the same magnitude
        for name in SPLIT:
            found[f"mtp.layers.0.mlp.experts.{number}.{name}.weight"].sign_().mul_(0.02)
    if stacked:
        own = {name: [found.pop(f"mtp.layers.0.mlp.experts.{i}.{name}.weight") for i in range(8)] for name in SPLIT}
        both = [torch.cat(pair) for pair in zip(own["gate_proj"], own["up_proj"], strict=True)]
        tables = (torch.stack(both), torch.stack(own["down_proj"]))
        found |= {f"mtp.layers.0.mlp.experts.{name}": table for name, table in zip(TABLES, tables, strict=True)}
    save_file(found, folder / "mtp.safetensors", metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(found, "mtp.safetensors")
    index.write_text(json.dumps(content))
    return found


@pytest.mark.parametrize(("stacked", "stream"), [(False, True), (True, False)])
def test_experts_of_an_unloaded_layer_are_removed_with_the_others(stacked: bool, stream: bool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
    }
    before = carry(save_pico(tmp_path / "model", "qwen3_next", **sizes), stacked)
    write_words(tmp_path / "words.txt")
    places = {"save": str(tmp_path / "run"), "save_model": str(tmp_path / "small"), "model": str(tmp_path / "model")}
    data = {"dataset": str(tmp_path / "words.txt"), "nsamples": 2, "seqlen": 16, "evaluate": False, "stream": stream}
    report = run_recipe(make_recipe({"remove": "experts=0.25", **places, **data}), reporter=Reporter(quiet=True)).report
    after = {n: t for n, t in load_file(tmp_path / "small" / "model.safetensors").items() if n.startswith("mtp.")}
    left = [1, 2, 3, 4, 5, 6]
    expected = {name: tensor for name, tensor in before.items() if ".experts." not in name}
    expected["mtp.layers.0.mlp.gate.weight"] = before["mtp.layers.0.mlp.gate.weight"][left]
    for name in SPLIT if not stacked else ():
        for new, old in enumerate(left):
            source = before[f"mtp.layers.0.mlp.experts.{old}.{name}.weight"]
            expected[f"mtp.layers.0.mlp.experts.{new}.{name}.weight"] = source
    for name in TABLES if stacked else ():
        expected[f"mtp.layers.0.mlp.experts.{name}"] = before[f"mtp.layers.0.mlp.experts.{name}"][left]
    assert after.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.items())
    assert CarriedExperts(mixture="mtp.layers.0", before=8, after=6) in report.edits
