"""Exceptions of single families from the rules of `shrink.py`, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exceptional:
    """Settings of one model type."""

    why: str
    settings: dict[str, Any]


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROTATED = "positions of images have shares of a head, made for wide ones"


def _rotated(*shares: int, **more: Any) -> Exceptional:
    return Exceptional(_ROTATED, {"rope_parameters": {**_ROPE, "mrope_section": list(shares), **more}})


_GEMMA4 = {
    "global_head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_HEAD = Exceptional("the width of its heads has no default", {"head_dim": 16})
_MAMBA = "its state space has to be as wide as its heads together"
_BYTES = "its vocabulary is bytes, and most of its layers are of its global model, which is twice as wide as the others"
_LOCAL = {"vocab_size": 1024, "hidden_size": 32, "hidden_size_global": 64}
_STAGES = "the widths of its stages hang together in ways of their own"

UNBUILT = {"mra": "its attention answers zeros without its kernel for CUDA"}
"""Types that transformers itself cannot run here, without saying so."""
EXCEPTIONS: dict[str, Exceptional] = {
    "apertus1p5": Exceptional("its codes follow its words", {"image_token_offset": 896, "audio_token_offset": 960}),
    "bamba": Exceptional("which of its layers have attention has no default", {"attn_layer_indices": [1]}),
    "bit": Exceptional("its norms have 32 groups", {"num_groups": 4}),
    "blt": Exceptional("its vocabulary is bytes", {"vocab_size": 1024}),
    "blt_global_transformer": Exceptional(_BYTES, {"num_hidden_layers": 4}),
    "blt_local_decoder": Exceptional(_BYTES, _LOCAL),
    "blt_local_encoder": Exceptional(_BYTES, _LOCAL),
    "blt_patcher": Exceptional(_BYTES, {"vocab_size": 1024, "hidden_size": 32}),
    "cohere_compass_text": Exceptional(
        "positions of its full attention have no default",
        {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    ),
    "chameleon": Exceptional("its words for images have no default", {"vocabulary_map": {"<image>": 1004}}),
    "cosmos3_edge_text": _rotated(2, 3, 3),
    "cvt": Exceptional(_STAGES, {"embed_dim": (16, 48, 96), "depth": (1, 2, 3)}),
    "dbrx": Exceptional(
        "its rotary base has no default",
        {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "max_seq_len": 128},
    ),
    "deepseek_ocr2_text": Exceptional(
        "which of its layers have experts has no default",
        {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    ),
    "deepseek_v2": Exceptional("how many experts a token gets has no default", {"num_experts_per_tok": 2}),
    "dots1": Exceptional(
        "the numbers of its experts have no defaults",
        {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    ),
    "diffusion_gemma_text": Exceptional(
        "the numbers of its experts have no defaults",
        {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "donut-swin": Exceptional(
        _STAGES, {"image_size": 64, "window_size": 2, "embed_dim": 16, "num_heads": (1, 2, 2, 4)}
    ),
    "efficientnet": Exceptional(
        "it is made larger by factors", {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
    ),
    "dots3_note_text": Exceptional(
        "its layers of sliding attention have sizes of their own",
        {
            "head_dim": 24,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 24,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 16,
        },
    ),
    "emu3": Exceptional("its words for images have no default", {"vocabulary_map": {"<image>": 1004}}),
    "ernie4_5_vl_moe_text": _rotated(3, 3, 2),
    "falcon_h1": Exceptional(_MAMBA, {"mamba_d_ssm": 128, "mamba_d_head": 32}),
    "gemma3n_vision": Exceptional(
        "its eyes are one of timm's models, and large", {"architecture": "test_efficientnet", "hidden_size": 64}
    ),
    "gemma4_text": Exceptional("the small released ones share keys and values between layers", _GEMMA4),
    "gemma4_unified_text": Exceptional("as gemma4_text", _GEMMA4),
    "glm4v_moe_text": _rotated(1, 1, 2, partial_rotary_factor=0.5),
    "glm4v_text": _rotated(2, 3, 3),
    "glm_ocr_text": _rotated(2, 3, 3),
    "gpt_neo": Exceptional("its kinds of layers are told in pairs", {"attention_types": [[["global", "local"], 1]]}),
    "granite4_vision": Exceptional(
        "which layers get images has no default, and a head of its tower has 64 columns",
        {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 0]],
            "spatial_target_layers": [1],
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 8,
            },
        },
    ),
    "granite4_vision_text": Exceptional(
        "its model has a lot beside it", {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 256}
    ),
    "hgnet_v2": Exceptional(
        _STAGES,
        {
            "stem_channels": (3, 16, 16),
            "hidden_sizes": (32, 64, 64, 64),
            "stage_in_channels": (16, 32, 64, 64),
            "stage_mid_channels": (16, 16, 32, 32),
            "stage_out_channels": (32, 64, 64, 64),
        },
    ),
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "hunyuan_vl_text": Exceptional(_ROTATED, {"head_dim": 16, **_rotated(2, 2, 2, 2).settings}),
    "hy_v4_vl_text": _rotated(2, 3, 3),
    "jamba": Exceptional(
        "its kinds of layers follow from periods",
        {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1},
    ),
    "lfm2_moe": Exceptional(
        "its kinds of layers have no default",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    ),
    "levit": Exceptional("its stem makes images sixteen times as small", {"image_size": 64, "patch_size": 16}),
    "mamba2": Exceptional(_MAMBA, {"head_dim": 32, "n_groups": 1}),
    "ministral": _HEAD,
    "mistral_large4_text": Exceptional(
        "layers may share keys and values with an earlier one, and by default none does",
        {
            "num_hidden_layers": 2,
            "kv_source_layers": [0, 1],
            "no_rope_layers": [1, 0],
            "indexer_types": ["full", "full"],
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["indexed_attention"] * 2,
        },
    ),
    "mllama_text_model": Exceptional(
        "one of its layers is for images", {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    ),
    "molmo2_adapter": Exceptional("it reads layers by their numbers", {"vision_feature_layer": [0]}),
    "mobilenet_v1": Exceptional("its width is a factor", {"depth_multiplier": 0.25, "image_size": 64}),
    "mobilenet_v2": Exceptional("its width is a factor", {"depth_multiplier": 0.35, "image_size": 64}),
    "mobilevitv2": Exceptional(
        "it makes images 32 times as small, and cuts them then", {"image_size": 128, "width_multiplier": 0.25}
    ),
    "nemotron": Exceptional("heads have no defaults", {"head_dim": 16, "num_key_value_heads": 2}),
    "paddleocr_vl_text": _rotated(2, 3, 3),
    "phi4_multimodal_audio": Exceptional(
        "widths of its convolutions hang together",
        {"num_blocks": 1, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64},
    ),
    "qwen2_5_omni_thinker": Exceptional("what begins an image has no default", {"vision_start_token_id": 1019}),
    "qwen3_omni_moe_thinker": Exceptional("what begins an image has no default", {"vision_start_token_id": 1019}),
    "qwen2_5_omni_text": _rotated(2, 3, 3),
    "qwen2_5_vl_text": _rotated(2, 3, 3),
    "qwen2_vl_text": _rotated(2, 3, 3),
    "qwen4_exp_text": Exceptional(
        "its indexer's sizes have no defaults",
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        },
    ),
    "radio": Exceptional("as its language model says", {"video_temporal_patch_size": 2}),
    "reformer": Exceptional(
        "it is an encoder unless told otherwise, and its positions are a product",
        {
            "is_decoder": True,
            "axial_pos_shape": (8, 16),
            "axial_pos_embds_dim": (16, 48),
            "vocab_size": 1024,
            "num_buckets": 4,
        },
    ),
    "step3p5": Exceptional("its window has no default", {"sliding_window": 16}),
    "swin": Exceptional(_STAGES, {"image_size": 64, "window_size": 2, "embed_dim": 16, "num_heads": (1, 2, 2, 4)}),
    "swinv2": Exceptional(_STAGES, {"image_size": 64, "window_size": 2, "embed_dim": 16, "num_heads": (1, 2, 2, 4)}),
    "textnet": Exceptional(_STAGES, {"stem_out_channels": 16, "hidden_sizes": (16, 16, 32, 64, 128)}),
    "wavtokenizer_encoder": Exceptional("its codes are as wide as itself", {"hidden_size": 64, "codebook_dim": 64}),
    "xlstm": Exceptional(
        "transformers' code for CPUs wants keys and values of one width, and texts as short as these go in one piece",
        {"qk_dim_factor": 1.0, "max_inference_chunksize": 16384},
    ),
    "xmod": Exceptional("its language has no default", {"default_language": "en_XX"}),
    "zamba": Exceptional(
        "its blocks share one layer, so two of them have to have it",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        },
    ),
    "zamba2": Exceptional(
        "as zamba", {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
    ),
}
