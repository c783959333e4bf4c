"""The common part of all readers: read folder after folder and print a line of JSON for each."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Read = Callable[[str, list[int], int], dict[str, Any]]


def each(read: Read, version: str, job: dict[str, Any]) -> None:
    """Read the folders of a job; an error is recorded as the answer.

    Args:
        read: returns the log-probabilities of the next token by id, and the ids of a greedy continuation.
        version: the runtime's version.
        job: the folders, with the context and the number of tokens to generate.
    """
    # Runtimes print to standard output, also from other processes.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for folder, tokens in job["folders"].items():
        began = time.monotonic()
        lines.write(json.dumps({"folder": folder, "begun": True}) + "\n")
        lines.flush()
        try:
            found = read(folder, tokens, job["new"])
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        found |= {"folder": folder, "version": version, "seconds": round(time.monotonic() - began, 1)}
        lines.write(json.dumps(found) + "\n")
        lines.flush()
