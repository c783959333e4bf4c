"""Small files that are written whole or not at all."""

from __future__ import annotations

import difflib
from pathlib import Path

from coprune.base.durable import write_durably
from coprune.base.errors import BadInput


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all. Raises as `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it when it is on the disk; its folder is made if need be.

    Raises CopruneError if the disk is full, BadInput if the folder cannot be written to; nothing is left behind then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error


def like_named(path: Path, least: float = 0.6) -> Path | None:
    """What is beside a path that leads nowhere and is named most like it; None if nothing is.

    least: how alike, from 0 to 1.
    """
    if not path.parent.is_dir():
        return None
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=least)
    return path.parent / near[0] if near else None
