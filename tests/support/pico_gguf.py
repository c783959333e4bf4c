"""Write a pico model as a GGUF file like llama.cpp's converter."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType, GGUFWriter, quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel

from coprune.model.transformers_private import revert_conversion, saved_tensors

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")


def in_gguf_order(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection as in llama.cpp: the halves of every head interleaved."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def distinct_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Give every norm different weights, as training does; in new models all are one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def write_pico_gguf(
    model: PreTrainedModel, file: Path, kind: str = "F32", arch: str = "llama", tokenizer: str | None = None
) -> Path:
    """Write a llama or granite, or a qwen or OLMoE, whose rows keep their order; return the file.

    kind: type of its matrices; tokenizer: content of a byte-level tokenizer.json, none by default.
    """
    config: Any = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": head,
    }
    if arch in ("qwen3moe", "olmoe"):
        numbers |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    if arch == "qwen3moe":
        numbers |= {"expert_feed_forward_length": config.moe_intermediate_size}
        numbers |= {"attention.key_length": head, "attention.value_length": head}
    scales = {}
    if arch == "granite":
        scales = {"attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier}
        scales |= {"residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling}
    with closing(GGUFWriter(file, arch)) as writer:
        writer.add_name("pico")
        for key, number in numbers.items():
            writer.add_uint32(f"{arch}.{key}", number)
        for key, scale in scales.items():
            writer.add_float32(f"{arch}.{key}", scale)
        writer.add_float32(f"{arch}.rope.freq_base", config.rope_parameters["rope_theta"])
        writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
        if tokenizer is None:
            writer.add_key_value("tokenizer.ggml.model", "none", GGUFValueType.STRING)
        else:
            _write_tokens(writer, json.loads(tokenizer))
        for name, tensor in named_in_gguf(model, permuted=arch in ("llama", "granite")).items():
            values = tensor.float().contiguous().numpy()
            if values.ndim < 2 or kind == "F32" or "ffn_gate_inp" in name:
                writer.add_tensor(name, values.astype(np.float32))
            else:
                code = GGMLQuantizationType[kind]
                writer.add_tensor(name, quants.quantize(values, code), raw_dtype=code)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return file


def _write_tokens(writer: GGUFWriter, tokenizer: dict[str, Any]) -> None:
    ids = tokenizer["model"]["vocab"]
    added = {one["content"] for one in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(ids, key=ids.__getitem__))
    writer.add_token_types([3 if token in added else 1 for token in sorted(ids, key=ids.__getitem__)])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])


def named_in_gguf(model: PreTrainedModel, permuted: bool) -> dict[str, Tensor]:
    """Return a model's tensors under llama.cpp's names, with experts stacked. permuted: in llama's order of rows."""
    config: Any = model.config
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in revert_conversion(model, saved_tensors(model)).items():
        path, _, suffix = name.rpartition(".")
        if expert := _EXPERT.fullmatch(name):
            experts.setdefault(f"blk.{expert[1]}.ffn_{expert[2]}_exps.weight", []).append(tensor)
            continue
        if path in OUTSIDE:
            found[f"{OUTSIDE[path]}.{suffix}"] = tensor
            continue
        _, _, number, rest = path.split(".", 3)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(NAMES[rest])
        ordered = in_gguf_order(tensor, heads) if permuted and heads else tensor
        found[f"blk.{number}.{NAMES[rest]}.{suffix}"] = ordered
    return found | {name: torch.stack(parts) for name, parts in experts.items()}
