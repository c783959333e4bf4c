"""Synthetic LLaMA checkpoints of any depth and width, written shard by shard, with a tokenizer and a text of words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 4096


def write_llama(
    folder: Path, blocks: int, width: int, dtype: torch.dtype = torch.bfloat16, vocabulary: int = VOCABULARY
) -> int:
    """Write a LLaMA of random weights with equal blocks, unless it exists; returns its bytes. Holds one block in memory."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=2048,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
    )
    files = [f"model-{i + 1:05d}-of-{blocks + 1:05d}.safetensors" for i in range(blocks + 1)]
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        weight_map: dict[str, str] = {}
        for number, file in enumerate(files):
            tensors = _rest(config, dtype) if number == blocks else _block(config, number, dtype)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        word_tokenizer(vocabulary).save_pretrained(folder)
        config.save_pretrained(folder)
    return sum((folder / file).stat().st_size for file in files)


def _block(config: LlamaConfig, number: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    width, inner = config.hidden_size, config.intermediate_size
    keys = width // 128 * 64
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    tensors = {
        # Small enough that activations stay finite through a hundred blocks.
        f"model.layers.{number}.{name}.weight": (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(dtype)
        for name, shape in shapes.items()
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.{number}.{name}.weight"] = torch.ones(width, dtype=dtype)
    return tensors


def _rest(config: LlamaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(-1)
    shape = (config.vocab_size, config.hidden_size)
    return {
        "model.embed_tokens.weight": torch.randn(shape, generator=generator).to(dtype),
        "lm_head.weight": (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(dtype),
        "model.norm.weight": torch.ones(config.hidden_size, dtype=dtype),
    }


def word_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """The words w0, w1 … are the tokens 0, 1 …"""
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def write_words(file: Path, count: int = 50_000, vocabulary: int = VOCABULARY) -> Path:
    """Write a text of random words, one token each; returns the file."""
    generator = random.Random(0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(" ".join(f"w{generator.randrange(vocabulary)}" for _ in range(count)), encoding="utf-8")
    return file
