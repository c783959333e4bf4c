"""Settings of tiny models beyond attention and MLPs: state spaces, recurrences, convolutions, unusual tables.

Every kind of block of a family occurs once in its few blocks.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 256
# Grouped-query attention and odd head counts where a family has them, so that shapes differ.
COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_LINEAR_ATTENTION: dict[str, Any] = dict(
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    head_dim=16,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
_MAMBA2: dict[str, Any] = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_chunk_size=16)

HYBRIDS: dict[str, dict[str, Any]] = {
    "mamba": dict(COMMON, num_hidden_layers=2, state_size=8),
    "mamba2": dict(COMMON, num_hidden_layers=2, num_heads=4, head_dim=32, state_size=8, n_groups=1, chunk_size=16),
    "falcon_h1": dict(COMMON, num_hidden_layers=2, mamba_d_ssm=128, **_MAMBA2),
    "jamba": dict(
        COMMON,
        num_hidden_layers=3,
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    "bamba": dict(COMMON, num_hidden_layers=2, attn_layer_indices=[1], **_MAMBA2),
    "granitemoehybrid": dict(
        COMMON,
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        **_MAMBA2,
    ),
    "nemotron_h": dict(
        COMMON,
        layers_block_type=["mamba", "attention", "moe"],
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    ),
    # As in the large models, the widths of keys, values and the shared expert equal the number of experts.
    "qwen3_next": dict(
        COMMON | _LINEAR_ATTENTION,
        num_experts=32,
        num_experts_per_tok=8,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "qwen3_5_text": dict(COMMON | _LINEAR_ATTENTION),
    "qwen3_5_moe_text": dict(
        COMMON | _LINEAR_ATTENTION,
        num_experts=32,
        num_experts_per_tok=8,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "lfm2": dict(
        COMMON,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    "lfm2_moe": dict(
        COMMON,
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "rwkv": dict(COMMON, num_hidden_layers=2, attention_hidden_size=64, context_length=128),
    "recurrent_gemma": dict(
        COMMON,
        num_hidden_layers=3,
        lru_width=64,
        attention_window_size=8,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "dbrx": dict(
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        vocab_size=VOCABULARY,
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2, hidden_size=64),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "xlnet": dict(d_model=64, n_layer=2, n_head=4, d_inner=96, vocab_size=VOCABULARY),
}
"""Includes DBRX, whose experts are rows of two-dimensional tables, and XLNet with three-dimensional head matrices."""
