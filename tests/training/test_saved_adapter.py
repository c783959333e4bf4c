"""Malicious or invalid adapters give one message, and nothing is merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.training.adapters import add_adapter, choose_targets, merge_adapter, save_adapter
from coprune.training.masks import find_masks
from support.pruned import pruned_model

WEIGHTS = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pruned_model(num_hidden_layers=1)
    masks = find_masks(model)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    adapted = add_adapter(model, masks, choose_targets(masks, (), 4), 4, 8, masked=True)
    save_adapter(adapted, folder, "card")
    return folder


def merge_with(saved: Path, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Any:
    """Merge a copy of the adapter with another configuration, and optionally other tensors."""
    folder.mkdir()
    content = json.loads((saved / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file(load_file(saved / WEIGHTS) if tensors is None else tensors, folder / WEIGHTS)
    model = pruned_model(num_hidden_layers=1)
    return merge_adapter(model, find_masks(model), folder)


CONFIGS: list[dict[str, Any]] = [
    {"layer_replication": [[0, 10**9]]},
    {"rank_pattern": {"(a+)+$": 3}},
    {"alpha_pattern": {"(a+)+$": 3}},
    {"modules_to_save": ["lm_head"]},
    {"target_parameters": ["lm_head.weight"]},
    {"use_dora": True},
    {"bias": "all"},
    *({"r": rank} for rank in (0, -1, 5, 2**40, "4", 4.0, True, None)),
    *({"lora_alpha": alpha} for alpha in ("8", None, float("nan"), float("inf"))),
    *({"lora_dropout": dropout} for dropout in ("0", -1, 1, None)),
    {"task_type": "IMAGE"},
    {"peft_type": ["LORA"]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_configuration_with_unsupported_features_is_refused(
    config: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="adapter") as caught:
        merge_with(saved, tmp_path / "crafted", config)
    assert "\n" not in str(caught.value)


def test_patterns_in_a_configuration_are_not_evaluated(saved: Path, tmp_path: Path) -> None:
    """One of these would take hours on a name of thirty letters."""
    name = "model.layers.0.self_attn." + "a" * 30
    patterns = {"target_modules": "(.*.*)*x", "exclude_modules": "(a+)+$", "layers_pattern": "(a+)+$"}
    merged = merge_with(saved, tmp_path / "crafted", patterns | {"layers_to_transform": [9], "junk": name})
    plain = merge_with(saved, tmp_path / "plain", {})
    assert all(torch.equal(plain.state_dict()[key], tensor) for key, tensor in merged.state_dict().items())


TENSORS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "one factor": {f"{LAYER}.lora_A.weight": torch.zeros(4, 64)},
    "one dimension": {f"{LAYER}.lora_A.weight": torch.zeros(4)},
    "no dimension": {f"{LAYER}.lora_A.weight": torch.tensor(1.0)},
    "three dimensions": {f"{LAYER}.lora_A.weight": torch.zeros(4, 64, 1)},
    "another rank": {f"{LAYER}.lora_A.weight": torch.zeros(3, 64), f"{LAYER}.lora_B.weight": torch.zeros(96, 3)},
    "ranks that differ": {f"{LAYER}.lora_A.weight": torch.zeros(4, 64), f"{LAYER}.lora_B.weight": torch.zeros(96, 3)},
    "whole numbers": {f"{LAYER}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int32)},
    "another factor": {f"{LAYER}.lora_C.weight": torch.zeros(4, 64)},
    "a weight": {f"{LAYER}.weight": torch.zeros(96, 64)},
    "an embedding": {"base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 1002)},
    "a norm": {"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 64)},
    "no layer": {"base_model.model.nowhere.lora_A.weight": torch.zeros(4, 64)},
    "a name of another kind": {"weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("what", TENSORS)
def test_odd_tensors_are_refused(what: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="adapter") as caught:
        merge_with(saved, tmp_path / "crafted", {}, TENSORS[what])
    assert "\n" not in str(caught.value)
