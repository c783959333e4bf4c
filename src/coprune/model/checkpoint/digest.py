"""Digests of a model's content, independent of its name and location."""

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
"""Other files that affect a model's outputs: its configuration and its tokenizer."""
NOTES = ("report.json", "finetune.json", "distributions.json")
"""Reports beside a model, which do not affect its outputs."""


def model_digest(path: Path) -> str:
    """Return the digest of everything that affects a model's outputs.

    Every byte is read, which takes about half a second per gigabyte from the system's cache.

    Args:
        path: a GGUF file (all its parts count, its name does not), or a folder with weights, configuration and tokenizer.

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
"""A file, its size and its modification time."""


def _states(files: Iterable[Path]) -> tuple[_State, ...]:
    return tuple((file, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)


@lru_cache(maxsize=64)
def _digest(files: tuple[_State, ...], named: bool) -> str:
    # Cached per process, since a large model takes long to read; a write changes the modification time.
    return digest_of_files((file for file, _, _ in files), named=named)


def bytes_of_weights(path: Path) -> int:
    """Return the size of a model's weight files."""
    files = [path] if path.is_file() else [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    return sum(file.stat().st_size for file in files)
