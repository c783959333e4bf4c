"""Read a folder with OpenVINO, exported by optimum."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import torch
from each import SOUND, each, largest, pooled
from optimum.intel import OVModelForCausalLM, OVModelForFeatureExtraction, OVModelForSpeechSeq2Seq
from transformers import AutoFeatureExtractor

EXACT = {
    "export": True,
    "load_in_8bit": False,
    "ov_config": {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    },
}


def read(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return log-probabilities of the next token and the tokens of a greedy continuation."""
    model = OVModelForCausalLM.from_pretrained(folder, **EXACT)
    ids = torch.tensor([tokens])
    first = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float().log_softmax(-1)
    model.request.reset_state()
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, eos_token_id=None, do_sample=False
    )
    return {"values": largest(first.tolist()), "written": answer[0, len(tokens) :].tolist()}


def embed(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return the embedding of a text."""
    model, ids = OVModelForFeatureExtraction.from_pretrained(folder, **EXACT), torch.tensor([tokens])
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return {"values": pooled(folder, found[0]), "written": []}


def hear(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return log-probabilities of the next token and the tokens of a greedy transcript."""
    model = OVModelForSpeechSeq2Seq.from_pretrained(folder, **EXACT)
    heard = AutoFeatureExtractor.from_pretrained(folder)(SOUND, sampling_rate=16000, return_tensors="pt").input_features
    ids, written, values = list(tokens), list[int](), dict[int, float]()
    for _ in range(new):
        logits = model(input_features=heard, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
        values = values or largest(logits.log_softmax(-1).tolist())
        written.append(int(logits.argmax()))
        ids.append(written[-1])
        model.decoder.request.reset_state()
    return {"values": values, "written": written}


if __name__ == "__main__":
    each({"text": read, "embedding": embed, "speech": hear}, version("openvino"), json.loads(sys.argv[1]))
