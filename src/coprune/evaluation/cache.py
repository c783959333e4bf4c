"""Evaluations that were done already, kept by content: what was measured, of which weights, on what.

Each is one small file named by a hash of its key. A model is named by the bytes of its files, a local text by those of
its, so that nothing is looked up that has changed since. Files that cannot be read are measured again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from pydantic import BaseModel, ValidationError

from coprune.base.environment import user_cache
from coprune.base.errors import about
from coprune.base.files import write_text
from coprune.data.local_text import files_of, looks_local, split_column
from coprune.evaluation.texts import Text

Kept = TypeVar("Kept", bound=BaseModel)

# Raised whenever a measurement is done differently, so that older ones are not taken for it.
_GENERATION = 2
_WEIGHTS = ("*.safetensors", "*.gguf")
# What else decides a model's outputs: its configuration and how it cuts text into tokens.
_OTHERS = ("*.json", "*.model", "*.txt", "*.jinja")
_NOTES = ("report.json", "finetune.json", "distributions.json")


class EvaluationCache:
    """A folder of evaluations; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def find(self, key: str, kind: type[Kept]) -> Kept | None:
        """Return what is kept under a key; None if nothing is."""
        if self._folder is None:
            return None
        try:
            return kind.model_validate_json(_file_of(self._folder, key).read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            return None

    def get(self, key: str, kind: type[Kept], measure: Callable[[], Kept]) -> Kept:
        """Return what is kept under a key, or else measure and keep it.

        Of several processes one measures, and the others wait for what it finds. A killed one lets go.
        """
        if self._folder is None:
            return measure()
        if (kept := self.find(key, kind)) is not None:
            return kept
        self._folder.mkdir(parents=True, exist_ok=True)
        file = _file_of(self._folder, key)
        with FileLock(file.with_suffix(".lock")):
            # Another process may have measured it by now.
            if (kept := self.find(key, kind)) is not None:
                return kept
            found = measure()
            write_text(file, found.model_dump_json() + "\n")
            return found


def _file_of(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(f'{_GENERATION} {key}'.encode()).hexdigest()[:32]}.json"


def default_cache_folder() -> Path:
    """`coprune/evaluations` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return user_cache() / "evaluations"


def model_fingerprint(path: Path) -> str:
    """Name a model by its files' bytes: a GGUF file, or a folder's weights, configuration and tokenizer; 32 hex digits."""
    if path.is_file():
        return _digest([path])
    files = [file for pattern in (*_WEIGHTS, *_OTHERS) for file in path.glob(pattern) if file.name not in _NOTES]
    return _digest(sorted(files))


def bytes_of_weights(path: Path) -> int:
    """Size of a model's weight files."""
    files = [path] if path.is_file() else [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    return sum(file.stat().st_size for file in files)


def require_texts(texts: Iterable[Text]) -> None:
    """Raise BadInput for a text that is a local file or folder and not there; of a corpus nothing is asked."""
    for text in texts:
        if looks_local(text.name):
            with about("eval_data", text.label):
                files_of(split_column(text.name)[0])


def text_fingerprint(name: str) -> str:
    """Name an evaluation text: a local file or folder by its bytes, a corpus by its name."""
    if not looks_local(name):
        return name
    path, column = split_column(name)
    return f"{_digest(files_of(path))} {column or ''}"


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while part := stream.read(2**22):
                digest.update(part)
    return digest.hexdigest()
