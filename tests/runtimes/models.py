"""The folders on which runtimes are tested: small random models and real ones, whole and cut."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import WhisperFeatureExtractor, WhisperProcessor

import coprune
from coprune.base.errors import CopruneError
from coprune.model.checkpoint.load import load_model, load_processor, quiet_transformers
from coprune.model.checkpoint.locate import GgufFile, locate
from coprune.model.checkpoint.older_keys import add_older_keys
from coprune.recipe.parts import DtypeName
from runtimes.runtime_table import SOURCE, ZEROS
from support.pico import pico_model, pico_tokens
from support.pico_folder import pico_tokenizer, save
from support.pico_pairs import pico_pair_model, write_recordings
from support.pico_readers import add_sentence_modules, pico_reader
from support.quantised import Format, compressed, fp8_channel, int4, quantise

TOKENS, PROMPT = 24, "The capital of France is Paris, and that of Italy is"
_SHAPE: dict[str, Any] = dict(
    vocab_size=448,  # no other width: ONNX Runtime's builder tells the head by it
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_WINDOWS: dict[str, Any] = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2)
_EXPERTS: dict[str, Any] = dict(num_experts=8, num_experts_per_tok=2)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": dict(use_sliding_window=False, sliding_window=None),
    "qwen3": dict(head_dim=64),
    "gemma2": dict(_WINDOWS, head_dim=64, tie_word_embeddings=True),
    "gemma3_text": dict(_WINDOWS, head_dim=64, sliding_window_pattern=2, tie_word_embeddings=True),
    "mistral": dict(sliding_window=None),
    "phi3": dict(original_max_position_embeddings=256),
    "granite": {},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "cohere2": dict(_WINDOWS, sliding_window_pattern=2, tie_word_embeddings=True),
    "smollm3": {},
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": dict(_EXPERTS, head_dim=64, moe_intermediate_size=128, decoder_sparse_step=1),
    "olmoe": _EXPERTS,
    "qwen3_next": dict(
        _EXPERTS,
        head_dim=64,
        layer_types=["linear_attention", "full_attention"] * 2,
        full_attention_interval=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        decoder_sparse_step=1,
    ),
    "gpt_oss": dict(_WINDOWS, head_dim=64, num_local_experts=8, num_experts_per_tok=2),
    "deepseek_v3": dict(
        num_key_value_heads=4,
        moe_intermediate_size=128,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        topk_method="noaux_tc",  # as in published configurations, where vLLM expects it
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
    ),
    "bert": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4),
    "qwen3-embedding": dict(head_dim=64),
    "whisper": dict(
        d_model=256,
        encoder_layers=4,
        decoder_layers=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        num_mel_bins=80,
        max_source_positions=1500,  # half a minute of sound, as in published models: OpenVINO's export takes no other
    ),
}
"""Shape settings by model type, with heads of 64, the smallest that vLLM's CPU kernels support."""
_KINDS = {"bert": "embedding", "qwen3-embedding": "embedding", "whisper": "speech"}
_POOLING = {"bert": "mean", "qwen3-embedding": "lasttoken"}
_TOKEN: dict[str, Any] = dict(num_bits=8, type="float", strategy="token", dynamic=True, symmetric=True)
FORMS = {
    "fp8": Format(
        fp8_channel, compressed("float-quantized", _TOKEN, **(_TOKEN | dict(strategy="channel", dynamic=False)))
    ),
    "int4": Format(
        partial(int4, group=32),
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
    ),
}
"""Formats of compressed-tensors: the last part of the names of quantised models."""
QUANTISED = ("llama-fp8", "llama-int4")
SMALL_CUTS: dict[str, dict[str, Any]] = {
    "channels": {"remove": "channels=0.33"},
    "heads": {"remove": "heads=0.5"},
    # Not the last one, so that the following ones take other places.
    "blocks": {"remove": "blocks=0.25", "exclude": ["*.3.*"]},
    "experts": {"remove": "experts=0.25"},
    ZEROS: {"pattern": ZEROS, "method": "wanda"},
}

REAL_CUTS: dict[str, dict[str, str]] = {
    "channels": {"remove": "channels=0.33"},
    "heads": {"remove": "heads=0.34"},
    "blocks": {"remove": "blocks=0.2"},
    "vocabulary": {"remove": "vocabulary=0.25"},
    ZEROS: {"pattern": ZEROS, "method": "wanda"},
}


@dataclass(frozen=True)
class Tried:
    """A folder for runtimes to read."""

    model: str
    """Type of model, or the name of a real one."""
    part: str
    """The removed part; "source" for the uncut model."""
    folder: Path
    tokens: list[int]
    """Context of the compared next token."""

    @property
    def kind(self) -> str:
        """Kind of model: text, embedding or speech."""
        return _KINDS.get(self.model, "text")


def small(name: str, into: Path) -> Iterator[Tried]:
    """Make a small random model and its cuts, keeping existing ones."""
    source = into / name / SOURCE
    if not source.exists():
        if dense := dense_name(name):
            _quantise(next(small(dense, into)).folder, name, source)
        else:
            _save(name, source)
            _as_on_the_hub(source)
    tokens, asked_of_all = random.Random(0).choices(range(3, 256), k=TOKENS), dict[str, Any](dataset=pico_tokens(8))
    if _KINDS.get(name) == "speech":
        tokens = [4, *tokens[:2]]  # the decoder starts with 4
        asked_of_all = dict(dataset=write_recordings(into / "recordings"), nsamples=2)
    yield Tried(name, SOURCE, source, tokens)
    for part, asked in SMALL_CUTS.items():
        if (folder := _cut(source, into / name / part, **asked_of_all, **asked)) is not None:
            yield Tried(name, part, folder, tokens)


def _save(name: str, folder: Path) -> None:
    """Save a small random model with its tokenizer, and with its pooling or feature extractor."""
    if name == "whisper":
        model: Any = pico_pair_model("Whisper", **FAMILIES[name])
    elif name == "bert":
        model = pico_reader("BertModel", **FAMILIES[name])
    else:
        model = pico_model(name.removesuffix("-embedding"), **(_SHAPE | FAMILIES[name]))
    save(model.base_model if name in _POOLING else model, folder)
    if name in _POOLING:
        add_sentence_modules(folder, {"pooling_mode": _POOLING[name], "word_embedding_dimension": 256}, "Normalize")
    if name == "whisper":
        WhisperProcessor(WhisperFeatureExtractor(), pico_tokenizer()).save_pretrained(folder)


def dense_name(name: str) -> str:
    """Return the name of the dense model that a quantised one is made from; "" for others."""
    dense, _, form = name.rpartition("-")
    return dense if form in FORMS else ""


def _quantise(dense: Path, name: str, source: Path) -> None:
    with TemporaryDirectory() as made:
        quantise(shutil.copytree(dense, Path(made) / SOURCE), source, FORMS[name.rpartition("-")[2]])


def real(name: str, model: str, into: Path, parts: Collection[str] = REAL_CUTS) -> Iterator[Tried]:
    """Make the folder of a real model and its cuts of these parts."""
    source = into / name / SOURCE
    if dense := dense_name(name):
        if not source.exists():
            _quantise(next(real(dense, model, into)).folder, name, source)
    elif not source.exists():
        where = locate(model)
        with quiet_transformers():
            dtype: DtypeName = "bfloat16" if isinstance(where, GgufFile) else "auto"
            loaded, _ = load_model(where, dtype, processed=False)
            loaded.save_pretrained(source)
            load_processor(where, "text").save_pretrained(source)
        _as_on_the_hub(source)
    yield Tried(name, SOURCE, source, _tokens(source))
    for part in parts:
        folder = _cut(source, into / name / part, dataset="embedded", nsamples=8, seqlen=128, **REAL_CUTS[part])
        if folder is not None:
            yield Tried(name, part, folder, _tokens(folder))


def _tokens(folder: Path) -> list[int]:
    """Return the tokens of a text, which depend on a cut vocabulary."""
    tokens: list[int] = load_processor(locate(str(folder)), "text")(PROMPT)["input_ids"]
    return tokens


def _cut(source: Path, folder: Path, **asked: Any) -> Path | None:
    """Return a folder with a part removed; None if coprune refuses."""
    if not folder.exists():
        try:
            coprune.prune(str(source), save_model=folder, evaluate=False, quiet=True, **asked)
        except CopruneError as error:
            print(f"{source.parent.name} {folder.name}: {error}", flush=True)
            return None
    return folder


def _as_on_the_hub(folder: Path) -> None:
    """Write the configuration with the keys of published checkpoints, most of them from older versions."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    add_older_keys(config)
    if "num_local_experts" in config and config["model_type"] == "qwen3_moe":  # the name that mlx-lm reads
        config["num_experts"] = config["num_local_experts"]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
