"""Read a folder with transformers, in float32; coprune decodes quantised weights, which transformers may round once more."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from each import SOUND, each, pooled
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate

VERSION = __import__("transformers").__version__


def read(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return log-probabilities of the next token and the tokens of a greedy continuation."""
    model = _model(folder).eval()
    return _written(lambda ids: model(ids, use_cache=False).logits, tokens, new)


def embed(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return the embedding of a text."""
    with torch.inference_mode():
        found = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(torch.tensor([tokens]))
    return {"values": pooled(folder, found.last_hidden_state[0]), "written": []}


def hear(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return log-probabilities of the next token and the tokens of a greedy transcript."""
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32).eval()
    heard = AutoFeatureExtractor.from_pretrained(folder)(SOUND, sampling_rate=16000, return_tensors="pt").input_features
    return _written(lambda ids: model(heard, decoder_input_ids=ids, use_cache=False).logits, tokens, new)


@torch.inference_mode()
def _written(logits_of: Callable[[torch.Tensor], torch.Tensor], tokens: list[int], new: int) -> dict[str, Any]:
    ids = torch.tensor([tokens])
    first = logits_of(ids)[0, -1].log_softmax(-1)
    for _ in range(new):
        ids = torch.cat([ids, logits_of(ids)[:, -1:].argmax(-1)], 1)
    return {"values": dict(enumerate(first.tolist())), "written": ids[0, len(tokens) :].tolist()}


def _model(folder: str) -> PreTrainedModel:
    if hasattr(AutoConfig.from_pretrained(folder), "quantization_config"):
        return load_model(locate(folder), processed=False, dtype="float32")[0]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


if __name__ == "__main__":
    each({"text": read, "embedding": embed, "speech": hear}, VERSION, json.loads(sys.argv[1]))
