"""Write a pico llama as the GGUF file that llama.cpp's converter would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType, GGUFWriter, quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def in_gguf_order(rows: Tensor, heads: int) -> Tensor:
    """The rows of a query or key projection as llama.cpp has them: the halves of every head interleaved."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def distinct_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Give every norm weights of its own, as training does; in new models all are one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def write_pico_gguf(model: PreTrainedModel, file: Path, kind: str = "F32", **keys: int) -> Path:
    """Write a llama. kind: how its matrices are stored. keys: more metadata of the architecture; returns the file."""
    config: Any = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_name("pico")
    numbers = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
    }
    for key, number in (numbers | keys).items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_float32("llama.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_key_value("tokenizer.ggml.model", "none", GGUFValueType.STRING)
    for name, tensor in model.state_dict().items():
        path, _, suffix = name.rpartition(".")
        if path in OUTSIDE:
            named = f"{OUTSIDE[path]}.{suffix}"
        else:
            _, _, number, rest = path.split(".", 3)
            named = f"blk.{number}.{NAMES[rest]}.{suffix}"
        if ".attn_q." in named:
            tensor = in_gguf_order(tensor, config.num_attention_heads)
        if ".attn_k." in named:
            tensor = in_gguf_order(tensor, config.num_key_value_heads)
        values = tensor.float().contiguous().numpy()
        if values.ndim < 2 or kind == "F32":
            writer.add_tensor(named, values.astype(np.float32))
        else:
            code = GGMLQuantizationType[kind]
            writer.add_tensor(named, quants.quantize(values, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
