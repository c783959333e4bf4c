"""Read a folder with ONNX Runtime GenAI, from the graph that its model builder makes."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime_genai
from each import each, largest

# The builder imports its own modules as if it were run as a script.
sys.path.append(str(Path(onnxruntime_genai.__file__).parent / "models"))

from builder import create_model, parse_extra_options


def read(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return log-probabilities of the next token and the tokens of a greedy continuation."""
    with TemporaryDirectory() as made:
        given = (None, folder, made, "fp32", "cpu", f"{made}/cache")
        create_model(*given, **parse_extra_options(*given, []))
        model = onnxruntime_genai.Model(made)
        asked = onnxruntime_genai.GeneratorParams(model)
        asked.set_search_options(max_length=len(tokens) + new)
        generator, ids = onnxruntime_genai.Generator(model, asked), tokens
        written, values = list[int](), dict[int, float]()
        for _ in range(new):
            generator.append_tokens(ids)
            logits = generator.get_logits()[0, -1].astype(np.float64)
            values = values or largest((logits - np.logaddexp.reduce(logits)).tolist())
            ids = [int(logits.argmax())]
            written += ids
    return {"values": values, "written": written}


if __name__ == "__main__":
    each({"text": read}, version("onnxruntime-genai"), json.loads(sys.argv[1]))
