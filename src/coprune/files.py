"""Small files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from coprune.errors import BadInput


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it when it is on the disk.

    Raises BadInput if the disk is full or the folder cannot be written to; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written: {error.strerror}.") from error
