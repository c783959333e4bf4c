"""Read a folder with mlx-lm, on the CPU."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from each import each, largest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)


def read(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return log-probabilities of the next token and the tokens of a greedy continuation."""
    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    cache, ids = make_prompt_cache(model), list(tokens)
    written, values = list[int](), dict[int, float]()
    for _ in range(new):
        logits = model(mx.array([ids]), cache=cache)[0, -1].astype(mx.float32)
        values = values or largest((logits - mx.logsumexp(logits)).tolist())
        ids = [int(mx.argmax(logits))]
        written += ids
    return {"values": values, "written": written}


if __name__ == "__main__":
    each({"text": read}, version("mlx-lm"), json.loads(sys.argv[1]))
