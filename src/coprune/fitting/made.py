"""The file or folder of a model that was made: its bytes, its digest, a copy, and the note on how long it took."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from coprune.base.files import whole_folder, write_durably


def files_in(made: Path) -> list[Path]:
    """List a file, or the weights of a folder."""
    return sorted(made.glob("*.safetensors")) if made.is_dir() else [made]


def bytes_in(made: Path) -> int:
    """Return the bytes of a file, or of a folder's weights."""
    return sum(file.stat().st_size for file in files_in(made))


def digest_of(made: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's weights."""
    digest = hashlib.sha256()
    for file in files_in(made):
        with file.open("rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def copy(source: Path, target: Path) -> None:
    """Copy a file or folder, whole or not at all; over an earlier one."""
    if not source.is_dir():
        write_durably(target, lambda path: shutil.copyfile(source, path))
        return
    shutil.rmtree(target, ignore_errors=True)
    with whole_folder(target) as out:
        shutil.copytree(source, out, dirs_exist_ok=True)


def note_of(made: Path) -> Path:
    """Return the file that tells the seconds of making something."""
    return made.with_name(f"{made.name}.seconds.json")


def seconds_in(note: Path) -> float:
    """Return the seconds that a note tells."""
    return float(json.loads(note.read_text(encoding="utf-8"))["seconds"])


def seconds_of(made: Path) -> float:
    """Return the seconds that making something took; 0 where nothing is noted."""
    note = note_of(made)
    return seconds_in(note) if note.exists() else 0.0
