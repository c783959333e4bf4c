"""A tiny random model of any class of transformers, from its default configuration, shrunk by the names of sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 256
HIDDEN = 64

# Names of sizes in various configurations. Every width is a multiple of four.
SIZES: dict[int, str] = {
    1: """encoder_layers num_encoder_layers n_groups mamba_n_groups first_k_dense_replace num_dense_layers
        n_shared_experts topk_group n_group num_shared_experts""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_key_value_heads num_kv_heads
        kv_n_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k top_k_experts linear_num_key_heads
        num_global_key_value_heads num_local_experts_per_tok altup_num_inputs""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts linear_num_value_heads num_codebooks index_n_heads
        mamba_n_heads mamba_num_heads""",
    8: """qk_rope_head_dim state_size ssm_state_size mamba_d_state sliding_window sliding_window_size laurel_rank
        attention_window_size""",
    16: """head_dim qk_nope_head_dim v_head_dim d_kv attention_head_dim linear_key_head_dim linear_value_head_dim
        global_head_dim hidden_size_per_layer_input mamba_chunk_size chunk_size index_head_dim swa_head_dim swa_v_head_dim""",
    32: """moe_intermediate_size q_lora_rank kv_lora_rank shared_expert_intermediate_size shared_intermediate_size
        ffn_hidden_size moe_shared_expert_intermediate_size mamba_head_dim mamba_d_head""",
    HIDDEN: """hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim emb_dim lru_width attention_hidden_size
        dim rnn_hidden_size embedding_dim cross_attention_hidden_size""",
    96: """intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim d_ff dim_feedforward intermediate_size_mlp
        d_inner dense_intermediate_size expert_dim""",
    128: """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions context_length
        seq_length mamba_d_ssm""",
    VOCABULARY: "vocab_size n_vocab n_token vocab_size_per_layer_input decoder_vocab_size",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)


def tiny_settings(kind: type[PreTrainedConfig], **exceptions: Any) -> dict[str, Any]:
    """Return small values for a configuration class's known sizes, including nested configurations."""
    settings: dict[str, Any] = {}
    default = kind()
    for name in _fields(kind):
        value = getattr(default, name, None)
        if isinstance(value, PreTrainedConfig):
            settings[name] = tiny_settings(type(value), **exceptions.pop(name, {}))
        elif name in SIZE_OF and isinstance(value, int) and not isinstance(value, bool):
            settings[name] = SIZE_OF[name]
        elif name in TOKENS:
            settings[name] = TOKENS[name]
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if len(kinds) > 1 and "layer_types" in _fields(kind):
        settings |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return settings | exceptions


def _fields(kind: type[PreTrainedConfig]) -> Iterator[str]:
    own = inspect.signature(kind.__init__).parameters
    return (name for name in own if name not in ("self", "kwargs"))


def tiny_model(model_type: str, seed: int = 0, **exceptions: Any) -> PreTrainedModel:
    """Build the model of a type."""
    kind = CONFIG_MAPPING[model_type]
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(kind(**tiny_settings(kind, **exceptions)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.1)
    return model.eval().requires_grad_(False)
