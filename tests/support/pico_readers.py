"""Tiny encoders of whole texts as folders, with a tokenizer that adds special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from coprune.model.checkpoint.load import quiet_transformers
from support.pico_hybrids import VOCABULARY

FIRST, LAST, MASK, PAD = 1, 2, 0, 4
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=128,
    pad_token_id=PAD,
)


def pico_reader(name: str, **changes: Any) -> PreTrainedModel:
    """Build a BERT or Qwen3 model of a class, with random weights large enough that every block matters."""
    torch.manual_seed(0)
    bert = name.startswith("Bert")
    config: Any = BertConfig(**_SIZES | changes) if bert else Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=16)
    model: PreTrainedModel = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.1)
    return model.eval().requires_grad_(False)


def marking_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of the words w5 … w255 (anything else is w3) with a special token before and after every text."""
    names = {MASK: "<mask>", FIRST: "<s>", LAST: "</s>", PAD: "<pad>"}
    vocabulary = {names.get(number, f"w{number}"): number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", FIRST), ("</s>", LAST)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>", pad_token="<pad>", unk_token="w3")


def save_reader(folder: Path, name: str, **changes: Any) -> Path:
    """Save a model with its tokenizer; return the folder."""
    with quiet_transformers():
        pico_reader(name, **changes).save_pretrained(folder)
        marking_tokenizer().save_pretrained(folder)
    return folder


def add_sentence_modules(folder: Path, pooling: dict[str, Any], last: Literal["Dense", "Normalize"] = "Dense") -> None:
    """Add sentence-transformers modules to a folder: pooling, followed by a layer with weights or by normalisation."""
    kinds = ("Transformer", "Pooling", last)
    for number, kind in enumerate(kinds):
        (folder / f"{number}_{kind}").mkdir(exist_ok=True) if number else None
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(zip(("", "1_Pooling", f"2_{last}"), kinds, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "w5 w6"}}))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))
    if last == "Normalize":
        return
    layer = {"in_features": 64, "out_features": 32, "bias": False, "activation_function": "torch.nn.Identity"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(layer))
    save_file({"linear.weight": torch.ones(32, 64)}, folder / "2_Dense" / "model.safetensors")
