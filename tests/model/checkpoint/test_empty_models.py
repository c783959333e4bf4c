"""Models without weights have the shapes and buffers of real ones, without any initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from coprune.model.checkpoint.empty import without_weights
from support.pico import FAMILIES, MIXTURES


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "deepseek_v3"])
def test_shapes_and_buffers_are_those_of_a_model_with_weights(family: str) -> None:
    config = AutoConfig.for_model(family, **(FAMILIES | MIXTURES)[family])
    whole = AutoModelForCausalLM.from_config(config)
    with without_weights():
        empty = AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    shapes = [{name: own.shape for name, own in model.state_dict().items()} for model in (empty, whole)]
    assert shapes[0] == shapes[1]
    there = dict(empty.named_buffers())
    assert there.keys() == dict(whole.named_buffers()).keys()
    assert all(torch.equal(there[name], buffer) for name, buffer in whole.named_buffers())


def test_initialisation_of_real_tensors_is_unchanged() -> None:
    torch.manual_seed(0)
    expected = torch.empty(4).normal_()
    torch.manual_seed(0)
    with without_weights():
        nn.Linear(64, 64).weight.normal_()
        drawn = nn.init.normal_(torch.empty(4))
    assert torch.equal(drawn, expected)
