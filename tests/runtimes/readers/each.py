"""What every runtime's reader does: read folder after folder, and print a line of JSON for each."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Read = Callable[[str, list[int], int], dict[str, Any]]


def each(read: Read, version: str, job: dict[str, Any]) -> None:
    """Read the folders of a job; whatever a runtime says to one is its answer.

    Args:
        read: returns log-probabilities of the next token by its id, and the ids of a greedy continuation.
        version: the runtime's.
        job: the folders, with the tokens to go on from, and how many to write.
    """
    # Runtimes print to standard output, from other processes too.
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
