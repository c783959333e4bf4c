"""Read a folder with OpenVINO, exported by optimum."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import torch
from optimum.intel import OVModelForCausalLM


def read(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return log-probabilities of the next token and the tokens of a greedy continuation."""
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = OVModelForCausalLM.from_pretrained(folder, export=True, ov_config=exact, load_in_8bit=False)
    ids = torch.tensor([tokens])
    first = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float().log_softmax(-1)
    model.request.reset_state()
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, eos_token_id=None, do_sample=False
    )
    return {"logprobs": dict(enumerate(first.tolist())), "written": answer[0, len(tokens) :].tolist()}


if __name__ == "__main__":
    from each import each

    each(read, version("openvino"), json.loads(sys.argv[1]))
