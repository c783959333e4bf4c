"""A GGUF file is read once while transformers loads it, not nine times."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from coprune.model.checkpoint.gguf_reader import plain
from coprune.model.checkpoint.locate import GgufFile, Location

_Rest = ParamSpec("_Rest")
_Found = TypeVar("_Found")


def reading_once(
    load: Callable[Concatenate[Location, _Rest], _Found],
) -> Callable[Concatenate[Location, _Rest], _Found]:
    """A function that loads something from a location, as one that reads a GGUF file once; other locations are not touched.

    transformers reads a file anew for configuration, tokenizer and weights, and makes the map of names for every module:
    two thirds of the time that loading a small model took.
    """

    @wraps(load)
    def loading(location: Location, /, *rest: _Rest.args, **named: _Rest.kwargs) -> _Found:
        if not isinstance(location, GgufFile) or importlib.util.find_spec("gguf") is None:
            return load(location, *rest, **named)
        with _made_once():
            return load(location, *rest, **named)

    return loading


@contextmanager
def _made_once() -> Iterator[None]:
    """Whoever asks the package gguf for a file's reader or an architecture's names meanwhile gets what was made at first."""
    package: Any = importlib.import_module("gguf")
    own = {name: getattr(package, name) for name in ("GGUFReader", "get_tensor_name_map")}
    if isinstance(package.GGUFReader, type):  # else one loading calls another, and the file has been read
        package.GGUFReader = cache(plain(package.GGUFReader))
        package.get_tensor_name_map = cache(package.get_tensor_name_map)
    try:
        yield
    finally:
        for name, made in own.items():
            setattr(package, name, made)
