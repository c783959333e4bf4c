"""What a checkpoint's writer does with the files of its parts, and what it refuses to write over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coprune.base.errors import BadInput
from coprune.model.checkpoint.encoding import DENSE, Encoding, Place
from coprune.model.checkpoint.shards import join_files, placed_entries, read_tensor


def copy_tensors(files: Sequence[Path], target: Path, place: Place, encoding: Encoding) -> None:
    """Write the tensors of several dense files into one, stored as the encoding does; one is in memory at a time."""
    if encoding is DENSE:
        join_files(files, target, place)
        return
    entries = placed_entries(files, place)
    encoding.write(target, list(entries), ((name, read_tensor(entry)) for name, entry in entries.items()))


def refuse_occupied(folder: Path) -> None:
    """Raise BadInput if a folder that is to be written already holds something."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise BadInput(f"{folder} already exists", fix="remove it or choose another name. Nothing was overwritten")


def read_json_list(file: Path) -> list[Any] | None:
    """Read a JSON list; None if the file is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, list) else None
