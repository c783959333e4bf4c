"""Small tokenizers of every kind, trained on the samples, and pico models with one of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from coprune.model.checkpoint.load import quiet_transformers
from coprune.vocabulary.choose import Kept, choose
from coprune.vocabulary.kinds import BYTE_LETTERS, Vocabulary
from coprune.vocabulary.samples import LANGUAGES, SOURCES
from support.pico import pico_model

KINDS = ("bytes", "ignore_merges", "sentencepiece", "characters", "unigram", "wordpiece")
SIZE = 1024
TEXTS = [*LANGUAGES.values(), *SOURCES.values()]
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<unused0>", "<unused1>", "<tool>"]
_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}Answer briefly:"


@cache
def content_of(kind: str, size: int = SIZE) -> str:
    """Return the `tokenizer.json` of a kind."""
    made = {"unigram": _unigram, "wordpiece": _wordpiece}.get(kind)
    tokenizer = _bpe(kind, size) if made is None else made(size)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    content = json.loads(tokenizer.to_str())
    if kind == "ignore_merges":
        content["model"]["ignore_merges"] = True
    return json.dumps(content)


def _bpe(kind: str, size: int) -> Tokenizer:
    by_bytes = kind in ("bytes", "ignore_merges")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "sentencepiece" else []
    tokenizer = Tokenizer(
        models.BPE(unk_token=None if by_bytes else "<unk>", byte_fallback=bool(fallback), fuse_unk=True)
    )
    if by_bytes:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = list(BYTE_LETTERS) if by_bytes else []
    special = [*_SPECIAL, *fallback]
    limit: dict[str, Any] = {} if by_bytes else {"limit_alphabet": 120}
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **limit
    )
    # SentencePiece merges within words; otherwise whole sentences would become tokens.
    words = [piece for text in TEXTS for piece in (text if by_bytes else text.replace(" ", "\n ")).split("\n")]
    tokenizer.train_from_iterator(words, trainer)
    if not fallback:
        return tokenizer
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in fallback]
    return Tokenizer.from_str(json.dumps(content))


def _unigram(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _wordpiece(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def kept_of(content: dict[str, Any], size: int, seed: int = 0) -> Kept:
    """Return random tokens of a tokenizer, with the required ones."""
    vocabulary = Vocabulary.of(content)
    weights = np.random.default_rng(seed).random(len(vocabulary.tokens))
    return choose(size, weights, vocabulary.essential(), vocabulary.parts)


def save_with_tokens(folder: Path, family: str = "llama", content: str | None = None, **changes: Any) -> Path:
    """Save a pico model of a family with a tokenizer and one row per token; return the folder.

    content: of the tokenizer; byte-level by default.
    """
    tokenizer = Tokenizer.from_str(content_of("bytes") if content is None else content)
    ids: dict[str, Any] = {
        name: tokenizer.token_to_id(token) for name, token in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))
    }
    settings = {f"{name}_token_id": number for name, number in ids.items()}
    model = pico_model(family, **{"vocab_size": tokenizer.get_vocab_size(), **settings, **changes})
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="150KB")
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=_TEMPLATE, **names)
        wrapped.add_special_tokens({"additional_special_tokens": [AddedToken("<tool>", special=True)]})
        wrapped.save_pretrained(folder)
    return folder
