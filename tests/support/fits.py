"""Settings of a small fit, and files of items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.vocabularies import TEXTS, content_of

WORDS = "\n".join(TEXTS).split()
WITHOUT = "vocabulary,experts,channels,blocks,mixed"


def tokens() -> int:
    """Return the vocabulary size of the pico model."""
    return len(json.loads(content_of("bytes"))["model"]["vocab"])


def how(place: Path, **more: Any) -> dict[str, Any]:
    return {"text": str(place / "text.txt"), "types": "q8_0,q4_0", "quiet": True, "without": WITHOUT} | more


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
