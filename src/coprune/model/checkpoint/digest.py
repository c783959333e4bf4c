"""Digests of a model's files: what it is, whatever it is called and wherever it lies."""

from __future__ import annotations

from pathlib import Path

from coprune.base.files import digest_of_files
from coprune.model.checkpoint.locate import Location, gguf_parts
from coprune.model.checkpoint.names import VOCABULARIES

_WEIGHTS = ("*.safetensors", "*.gguf")
_OTHERS = ("*.json", "*.txt", "*.jinja", *VOCABULARIES)
"""What else decides a model's outputs: its configuration and how it cuts text into tokens."""
_NOTES = ("report.json", "finetune.json", "distributions.json")
"""Reports beside a model, which decide nothing of it."""


def source_digest(location: Location) -> str:
    """Return the digest of a located model; see `model_digest`."""
    return model_digest(location.path)


def model_digest(path: Path) -> str:
    """Return the digest of all that decides a model's outputs.

    Every byte is read: about half a second for a gigabyte that the system holds in memory already.

    Args:
        path: a GGUF file, of which all parts count and the name does not; or a folder with weights, configuration and tokenizer.

    Returns:
        32 hexadecimal digits.
    """
    if path.is_file():
        return digest_of_files(gguf_parts(path), named=False)
    files = {file for pattern in (*_WEIGHTS, *_OTHERS) for file in path.glob(pattern) if file.name not in _NOTES}
    return digest_of_files(sorted(files))


def bytes_of_weights(path: Path) -> int:
    """Return the size of a model's weight files."""
    files = [path] if path.is_file() else [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    return sum(file.stat().st_size for file in files)
