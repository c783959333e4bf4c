"""Tiny encoder-decoders, with random weights large enough that every block matters, and their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.io import wavfile
from transformers import PreTrainedModel, WhisperFeatureExtractor, WhisperProcessor

from coprune.data.pairs import Pairs
from coprune.model.checkpoint.load import quiet_transformers
from support.pico_hybrids import VOCABULARY
from support.pico_readers import marking_tokenizer

_BART: dict[str, Any] = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=48,
    vocab_size=VOCABULARY,
    pad_token_id=4,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=4,
)
_T5: dict[str, Any] = dict(
    d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=3, vocab_size=VOCABULARY,
    pad_token_id=4, eos_token_id=2, decoder_start_token_id=4,
)  # fmt: skip
_WHISPER = _BART | dict(num_mel_bins=16, max_source_positions=20, max_target_positions=64)
SIZES: dict[str, dict[str, Any]] = {
    "T5": _T5,
    "Bart": _BART | dict(max_position_embeddings=64),
    "Marian": _BART | dict(max_position_embeddings=64),
    "MBart": _BART | dict(max_position_embeddings=64),
    "Whisper": _WHISPER,
}
CLASSES = {"Marian": "MarianMTModel"}


def pico_pair_model(family: str, **changes: Any) -> PreTrainedModel:
    """Build a model of a family."""
    config = getattr(transformers, f"{family}Config")(**SIZES[family] | changes)
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, CLASSES.get(family, f"{family}ForConditionalGeneration"))(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and name not in (model._keys_to_ignore_on_save or ()):
                parameter.normal_(0.0, 0.2)
    return model.eval().requires_grad_(False)


def pico_pairs(model: PreTrainedModel, count: int, seed: int = 0) -> Pairs:
    """Return a model's data: sources of 12 tokens, or audio features, and targets of 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, VOCABULARY, (count, 9), generator=generator)
    if model.main_input_name == "input_ids":
        return Pairs.of(torch.randint(5, VOCABULARY, (count, 12), generator=generator), tokens)
    bins, frames = model.config.num_mel_bins, 2 * model.config.max_source_positions
    return Pairs.of(torch.randn(count, bins, frames, generator=generator), tokens)


def pico_processor(family: str) -> Any:
    """Return a family's tokenizer, with an audio feature extractor for speech models."""
    tokenizer = marking_tokenizer()
    if "num_mel_bins" not in SIZES[family]:
        return tokenizer
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=400)
    return WhisperProcessor(extractor, tokenizer)


def write_recordings(folder: Path) -> Path:
    """Write four recordings of noise, and transcripts of all but the first; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(4):
        samples = (generator.normal(size=8000) * 8000).astype(np.int16)
        wavfile.write(folder / f"{number}.wav", 16000, samples)
        if number:
            (folder / f"{number}.txt").write_text(f"w{number + 5} w{number + 6}")
    return folder


def save_pair_model(folder: Path, family: str, **changes: Any) -> Path:
    """Save a model with a tokenizer that adds special tokens and has a mask token, and an audio feature extractor."""
    with quiet_transformers():
        pico_pair_model(family, **changes).save_pretrained(folder, max_shard_size="100KB")
        pico_processor(family).save_pretrained(folder)
    return folder
