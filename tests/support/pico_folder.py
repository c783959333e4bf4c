"""Pico models as checkpoint folders for commands, with a word tokenizer and text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from coprune.model.checkpoint.load import quiet_transformers
from support.pico import pico_model
from support.pico_hybrids import VOCABULARY


def pico_tokenizer(bos: Literal["none", "known", "put"] = "none") -> PreTrainedTokenizerFast:
    """Make a tokenizer of the words w0 … w255 as tokens 0 … 255. bos: whether 1 is BOS, added before every text."""
    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
    if bos != "none":
        vocabulary = {"<s>" if number == 1 else word: number for word, number in vocabulary.items()}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if bos == "put":
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "w3"} | ({} if bos == "none" else {"bos_token": "<s>"})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_pico(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a pico model and its tokenizer; return the folder."""
    save(pico_model(family, dtype=dtype, **changes), folder)
    return folder


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model in several shards, with the word tokenizer."""
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="150KB")
        pico_tokenizer().save_pretrained(folder)


def write_words(file: Path, count: int = 600, seed: int = 0) -> Path:
    """Write a text of random words, one token each; return the file."""
    file.write_text(words_of(count, seed), encoding="utf-8")
    return file


def words_of(count: int, seed: int) -> str:
    """Return random words, one token each."""
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(3, VOCABULARY)}" for _ in range(count))


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder: content by path, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
