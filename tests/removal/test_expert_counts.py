"""The saved configuration has one consistent number of experts in all its places."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from coprune.base.progress import Reporter
from coprune.recipe.recipe import make_recipe
from coprune.runner.run_recipe import run_recipe
from support.pico_folder import save, save_pico, write_words
from support.pico_hybrids import HYBRIDS


def counts_after(folder: Path, stream: bool) -> dict[str, int]:
    """Remove two of eight experts of `model`; return every number of experts in the saved configuration."""
    write_words(folder / "words.txt")
    places = {"save": str(folder / "run"), "save_model": str(folder / "small"), "model": str(folder / "model")}
    data = {"dataset": str(folder / "words.txt"), "nsamples": 2, "seqlen": 16, "evaluate": False, "stream": stream}
    run_recipe(make_recipe({"remove": "experts=0.25", **places, **data}), reporter=Reporter(quiet=True))
    return dict(_counts(json.loads((folder / "small" / "config.json").read_text())))


def _counts(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value, f"{above}{name}.")
        elif name.endswith("_experts") and "shared" not in name:
            yield above + name, value


@pytest.mark.parametrize("stream", [True, False])
def test_all_counts_of_a_published_configuration_are_updated(stream: bool, tmp_path: Path) -> None:
    file = save_pico(tmp_path / "model", "qwen3_moe", num_hidden_layers=1, num_experts=8) / "config.json"
    config = json.loads(file.read_text())
    del config["num_local_experts"]  # transformers' current name; the second is for another program
    file.write_text(json.dumps(config | {"num_experts": 8, "n_routed_experts": 8}))
    found = counts_after(tmp_path, stream)
    assert {"n_routed_experts"} < set(found)
    assert set(found.values()) == {6}
    if stream:
        assert found.keys() == {"num_experts", "n_routed_experts"}


def test_expert_counts_are_updated_in_a_nested_text_configuration(tmp_path: Path) -> None:
    text = HYBRIDS["qwen3_next"] | {"num_experts": 8, "num_experts_per_tok": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    tower = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    torch.manual_seed(0)
    model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=tower))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1 if parameter.ndim >= 2 else parameter.data
    save(model.eval(), tmp_path / "model")
    assert counts_after(tmp_path, stream=True) == {"text_config.num_experts": 6}
