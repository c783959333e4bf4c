"""A mixture whose experts are modules in a list, as in models with their own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from support.pico_hybrids import COMMON


class ListedConfig(LlamaConfig):
    model_type = "listed_mixture"
    num_experts: int = 4
    experts_of_a_token: int = 2
    expert_channels: int = 32


class Expert(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, channels, bias=False) for _ in range(2))
        self.w2 = nn.Linear(channels, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.w2(torch.nn.functional.silu(self.w1(hidden)) * self.w3(hidden))
        return out


class ListedMixture(nn.Module):
    """A mixture with routed experts in a list, and a shared one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top = config.experts_of_a_token
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(config.hidden_size, config.expert_channels) for _ in range(config.num_experts)
        )
        self.shared = Expert(config.hidden_size, config.expert_channels)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        gates, index = self.gate(flat).softmax(dim=-1).topk(self.top, dim=-1)
        gates = gates / gates.sum(dim=-1, keepdim=True)
        out = self.shared(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (index == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(flat[token]) * gates[token, slot, None])
        found: Tensor = out.view_as(hidden)
        return found


class ListedForCausalLM(LlamaForCausalLM):
    config_class = ListedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListedMixture(config)


AutoConfig.register("listed_mixture", ListedConfig, exist_ok=True)
AutoModelForCausalLM.register(ListedConfig, ListedForCausalLM, exist_ok=True)


def listed_mixture(**changes: Any) -> PreTrainedModel:
    """Return such a model of two blocks with random weights."""
    torch.manual_seed(0)
    config: Any = ListedConfig(**COMMON, num_hidden_layers=2, **changes)
    model: PreTrainedModel = ListedForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.1)
    return model.eval().requires_grad_(False)
