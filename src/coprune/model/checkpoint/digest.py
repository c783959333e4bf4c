"""Digests of a model's files: what it is, whatever it is called and wherever it lies."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from coprune.base.files import digest_of_files
from coprune.model.checkpoint.gguf_header import gguf_parts
from coprune.model.checkpoint.locate import Location
from coprune.model.checkpoint.names import VOCABULARIES

_WEIGHTS = ("*.safetensors", "*.gguf")
_OTHERS = ("*.json", "*.txt", "*.jinja", *VOCABULARIES)
"""What else decides a model's outputs: its configuration and how it cuts text into tokens."""
NOTES = ("report.json", "finetune.json", "distributions.json")
"""Reports beside a model, which decide nothing of it."""


def model_digest(path: Path) -> str:
    """Return the digest of all that decides a model's outputs.

    Every byte is read: about half a second for a gigabyte that the system holds in memory already.

    Args:
        path: a GGUF file, of which all parts count and the name does not; or a folder with weights, configuration and tokenizer.

    Returns:
        32 hexadecimal digits.
    """
    if path.is_file():
        return _digest(_states(gguf_parts(path)), named=False)
    files = {file for pattern in (*_WEIGHTS, *_OTHERS) for file in path.glob(pattern) if file.name not in NOTES}
    return _digest(_states(sorted(files)), named=True)


def source_digest(location: Location) -> str:
    """Return the digest of a located model; see `model_digest`."""
    return model_digest(location.path)


_State = tuple[Path, int, int]
"""A file, its size and the time of its last change."""


def _states(files: Iterable[Path]) -> tuple[_State, ...]:
    return tuple((file, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)


@lru_cache(maxsize=64)
def _digest(files: tuple[_State, ...], named: bool) -> str:
    # A process reads a large model once for all who ask; whatever writes to a file changes its time.
    return digest_of_files((file for file, _, _ in files), named=named)


def bytes_of_weights(path: Path) -> int:
    """Return the size of a model's weight files."""
    files = [path] if path.is_file() else [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    return sum(file.stat().st_size for file in files)
