"""A GGUF file is read once while transformers loads it, not nine times."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """Whoever asks the package gguf for a file's reader or an architecture's names meanwhile gets what was made at first.

    transformers reads a file anew for configuration, tokenizer and weights, and makes the map of names for every module:
    two thirds of the time that loading a small model took.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    package: Any = importlib.import_module("gguf")
    own = {name: getattr(package, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, made in own.items():
        setattr(package, name, cache(made))
    try:
        yield
    finally:
        for name, made in own.items():
            setattr(package, name, made)
