"""The common part of all readers: read folder after folder and print a line of JSON for each."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Read = Callable[[str, list[int], int], dict[str, Any]]
SOUND = [math.sin(sample**2 / 5e4) for sample in range(16000)]
"""A second of a rising tone, which speech models are given."""


def largest(logprobs: list[float]) -> dict[int, float]:
    """Return the five most likely tokens' log-probabilities."""
    return dict(sorted(enumerate(logprobs), key=lambda one: -one[1])[:5])


def pooled(folder: str, hidden: Any) -> dict[int, float]:
    """Return a text's embedding, pooled from its tokens' hidden states as the folder says, as components by number."""
    config = json.loads((Path(folder) / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    vector = hidden.mean(0) if config["pooling_mode"] == "mean" else hidden[-1]
    return dict(enumerate((vector / vector.norm()).tolist()))


def each(reads: dict[str, Read], version: str, job: dict[str, Any], after_errors: bool = True) -> None:
    """Read the folders of a job; an error is recorded as the answer.

    Args:
        reads: returns an answer, by kind of model: the log-probabilities of the next token by id and the ids of a greedy
            continuation, or the components of an embedding.
        version: the runtime's version.
        job: the folders, each with its kind and the context, and the number of tokens to generate.
        after_errors: whether the process can still read folders after an error; else it ends, and the caller starts a new one.
    """
    # Runtimes print to standard output, also from other processes.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for folder, (kind, tokens) in job["folders"].items():
        began = time.monotonic()
        lines.write(json.dumps({"folder": folder, "begun": True}) + "\n")
        lines.flush()
        try:
            found = reads[kind](folder, tokens, job["new"])
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        found |= {"folder": folder, "version": version, "seconds": round(time.monotonic() - began, 1)}
        lines.write(json.dumps(found) + "\n")
        lines.flush()
        if "error" in found and not after_errors:
            return
