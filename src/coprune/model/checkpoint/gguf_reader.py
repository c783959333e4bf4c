"""What a GGUF file holds, as the package gguf reads it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from coprune.base.errors import BadInput


def gguf_reader(file: Path, field: str) -> Any:
    """The package's reader of a file: its tensors and metadata, mapped and not yet read.

    Raises BadInput, of the setting that named the file, where the package is missing or cannot read it.
    """
    try:
        from gguf.gguf_reader import GGUFReader
    except ImportError:
        raise BadInput(
            "GGUF files need the package gguf, which is not installed", fix="pip install 'coprune[gguf]'"
        ) from None
    try:
        return plain(GGUFReader)(file)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise BadInput(f"{file} cannot be read ({error})", field=field, fix="fetch it again") from error


@cache
def plain(reader: type[Any]) -> type[Any]:
    """The same class of readers, but they see the mapped file as a plain array.

    A vocabulary is hundreds of thousands of slices, and a slice of numpy's memmap is a memmap again, which costs more than
    all else: 262,144 tokens took 13 s of a core, and take 4.
    """

    class PlainReader(reader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

    return PlainReader
