"""Models with blocks of different widths, padded with zeros to one width, as stored in a folder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def pad_blocks(model: PreTrainedModel, channels: dict[int, int], heads: dict[int, list[int]]) -> PreTrainedModel:
    """Silence a llama's units in place. channels: number left, by block; heads: removed key-value heads, by block."""
    config: Any = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    every: Any = model
    with torch.no_grad():
        for number, left in channels.items():
            mlp = every.model.layers[number].mlp
            gone = torch.randperm(config.intermediate_size, generator=torch.Generator().manual_seed(number))[left:]
            mlp.down_proj.weight[:, gone] = 0
            _zero(gone, mlp.gate_proj, mlp.up_proj)
        for number, gone_heads in heads.items():
            attention = every.model.layers[number].self_attn
            for head in gone_heads:
                rows = slice(head * size, (head + 1) * size)
                wide = slice(head * queries * size, (head + 1) * queries * size)
                _zero(rows, attention.k_proj, attention.v_proj)
                _zero(wide, attention.q_proj)
                attention.o_proj.weight[:, wide] = 0
    return model


def _zero(rows: Any, *matrices: Any) -> None:
    for matrix in matrices:
        matrix.weight[rows] = 0
        if matrix.bias is not None:
            matrix.bias[rows] = 0
