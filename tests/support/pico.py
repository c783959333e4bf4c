"""Tiny models with random weights, built from configurations, one per family in the tests of the walk."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from support.pico_hybrids import COMMON, HYBRIDS, VOCABULARY

_COMMON: dict[str, Any] = dict(COMMON, num_hidden_layers=3)
_GPT: dict[str, Any] = dict(
    vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "opt": dict(_COMMON, ffn_dim=96, word_embed_proj_dim=64),
    "gpt2": _GPT,
    "mistral": dict(_COMMON, sliding_window=8),
    "qwen2": dict(_COMMON, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": dict(_COMMON, head_dim=16),
    "gemma2": dict(_COMMON, head_dim=16, sliding_window=8),
    "gemma3_text": dict(_COMMON, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    | {"num_hidden_layers": 4},
    "phi3": _COMMON,
    "gpt_neox": _COMMON,
    "bloom": dict(vocab_size=VOCABULARY, hidden_size=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
    "falcon": dict(_COMMON, new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "olmo2": _COMMON,
    "stablelm": _COMMON,
    "granite": _COMMON,
    "cohere": _COMMON,
    "starcoder2": dict(_COMMON, sliding_window=8),
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": dict(_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(
        _COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    ),
    "olmoe": dict(_COMMON, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(
        _COMMON,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "deepseek_v3": dict(
        _COMMON,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
}
MORE_MIXTURES: dict[str, dict[str, Any]] = {
    "qwen2_moe": dict(
        _COMMON,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
    ),
    "deepseek_v2": dict(
        _COMMON,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=16,
        n_shared_experts=1,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "llama4_text": dict(
        _COMMON, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1
    ),
}
"""Mixtures only used in tests of removing experts."""
SORTED_MIXTURES: dict[str, dict[str, Any]] = {
    "granitemoe": dict(_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": dict(_COMMON, kv_channels=16, num_local_experts=4, num_experts_per_tok=2),
}
"""Mixtures that sort tokens by expert; the second one's attention has experts, too."""
MORE_HEADS: dict[str, dict[str, Any]] = {
    "afmoe": dict(_COMMON, head_dim=16, num_dense_layers=3, num_experts=4, moe_intermediate_size=32),
    "minicpm3": dict(_COMMON, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=24)
    | dict(qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=16),
}
"""The first has a separate gate for attention outputs; the second compresses keys and values."""

_LAYERS_SHARE: dict[str, Any] = dict(
    _COMMON,
    head_dim=16,
    sliding_window=8,
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size_per_layer_input=16,
    pad_token_id=0,
)
SHARING: dict[str, dict[str, Any]] = {
    "gemma4_text": dict(_LAYERS_SHARE, global_head_dim=16, use_double_wide_mlp=True),
    "gemma3n_text": dict(_LAYERS_SHARE, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4),
}
"""Families whose later layers share keys and values of earlier ones, as in the small released models."""
ONE_FOR_SEVERAL: dict[str, dict[str, Any]] = {
    "zamba2": dict(
        _COMMON,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        mamba_headdim=16,
        mamba_d_state=8,
        n_mamba_heads=8,
        chunk_size=8,
        adapter_rank=8,
    ),
}
"""A family in which two layers share the same transformer."""


def pico_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Build a family's model, in evaluation mode, with random weights large enough that every block matters."""
    mixtures, others = MIXTURES | MORE_MIXTURES | SORTED_MIXTURES, SHARING | ONE_FOR_SEVERAL
    known = FAMILIES | mixtures | MORE_HEADS | others | HYBRIDS
    settings = known.get(family, {}) | changes
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.1)
    nn.Module.to(model, dtype)
    return model.eval().requires_grad_(False)


def pico_tokens(samples: int = 4, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Return random tokens: samples × length int64."""
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def randomise_vectors(model: PreTrainedModel) -> None:
    """Give biases and norms random values, since zeros and ones would hide missing or wrong changes to them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
