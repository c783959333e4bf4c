"""What inspect says of the parts that could go is what a removal takes."""

from __future__ import annotations

from typing import Any

import torch

import coprune
from support.pico import pico_model

IDS = torch.randint(60, (8, 32), generator=torch.Generator().manual_seed(0))
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "num_local_experts": 8,
}


def test_inspect_counts_what_a_removal_takes() -> None:
    model = pico_model("mixtral", **SHAPE)
    told = dict(coprune.inspect(model, quiet=True).removable)
    rows, width = model.lm_head.weight.shape
    assert told.pop("vocabulary=0.5") == 2 * (rows // 2) * width
    assert list(told) == ["experts=0.25", "channels=0.25", "heads=0.25", "blocks=0.2"]
    for part, gone in told.items():
        left = coprune.prune(pico_model("mixtral", **SHAPE), remove=part, dataset=IDS, evaluate=False, quiet=True).model
        assert left is not None
        assert model.num_parameters() - left.num_parameters() == gone, part


def test_inspect_only_names_parts_that_the_model_has() -> None:
    lines = str(coprune.inspect(pico_model("llama"), quiet=True)).splitlines()
    parts = [line for line in lines if line.startswith("could go  ")]
    assert parts
    assert not [line for line in parts if "experts" in line]
