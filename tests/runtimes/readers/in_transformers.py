"""Read a folder with transformers, in float32; coprune decodes quantised weights, which transformers may round once more."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate

VERSION = __import__("transformers").__version__


def read(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return log-probabilities of the next token and the tokens of a greedy continuation."""
    model = _model(folder).eval()
    ids, written = torch.tensor([tokens]), []
    with torch.inference_mode():
        first = model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
        for _ in range(new):
            written.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([written[-1:]])], 1)
    return {"logprobs": dict(enumerate(first.tolist())), "written": written}


def _model(folder: str) -> PreTrainedModel:
    if hasattr(AutoConfig.from_pretrained(folder), "quantization_config"):
        return load_model(locate(folder), processed=False, dtype="float32")[0]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


if __name__ == "__main__":
    from each import each

    each(read, VERSION, json.loads(sys.argv[1]))
