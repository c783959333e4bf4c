"""What a GGUF file holds, as the package gguf reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coprune.base.errors import BadInput


def gguf_reader(file: Path, field: str) -> Any:
    """The package's reader of a file: its tensors and metadata, mapped and not yet read.

    Raises BadInput, of the setting that named the file, where the package is missing or cannot read it.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise BadInput(
            "GGUF files need the package gguf, which is not installed", fix="pip install 'coprune[gguf]'"
        ) from None
    try:
        return GGUFReader(file)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise BadInput(f"{file} cannot be read ({error})", field=field, fix="fetch it again") from error
