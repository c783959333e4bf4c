"""The gguf package's reader, made faster for large vocabularies and cached where transformers would read a file repeatedly."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from coprune.base.errors import BadInput
from coprune.model.checkpoint.glance import no_gguf
from coprune.model.checkpoint.locate import GgufFile, Location
from coprune.model.transformers_private import gguf_metadata_read_once

_Rest = ParamSpec("_Rest")
_Found = TypeVar("_Found")


def reading_once(
    load: Callable[Concatenate[Location, _Rest], _Found],
) -> Callable[Concatenate[Location, _Rest], _Found]:
    """Wrap a loading function to parse a GGUF file only once; other locations are not affected.

    transformers parses the file for configuration, tokenizer and weights each, and builds the name map for every module,
    which took two thirds of a small model's loading time.
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
    """Cache the gguf package's readers and tensor names in the body, since loading asks for them repeatedly."""
    package: Any = importlib.import_module("gguf")
    own = {name: getattr(package, name) for name in ("GGUFReader", "get_tensor_name_map")}
    if isinstance(package.GGUFReader, type):  # else an outer load has installed the cache already
        package.GGUFReader = cache(_plain_reader(package.GGUFReader))
        package.get_tensor_name_map = cache(package.get_tensor_name_map)
    try:
        with gguf_metadata_read_once():
            yield
    finally:
        for name, made in own.items():
            setattr(package, name, made)


def gguf_reader(file: Path, field: str) -> Any:
    """Return the package's reader of a file, with memory-mapped tensors and metadata.

    field: the setting that named the file. Raises BadInput if the package is missing or cannot read the file.
    """
    try:
        from gguf.gguf_reader import GGUFReader
    except ImportError:
        raise no_gguf() from None
    try:
        return _plain_reader(GGUFReader)(file)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise BadInput(f"{file} cannot be read ({error})", field=field, fix="fetch it again") from error


@cache
def _plain_reader(reader: type[Any]) -> type[Any]:
    """Return a faster reader class: the file mapped as a plain array, and metadata arrays read in one go.

    A vocabulary is hundreds of thousands of slices. A slice of numpy's memmap is a slow memmap again, and the package calls
    five functions for each.
    """
    from gguf import GGUFValueType

    class PlainReader(reader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

        def _get_field_parts(self, offset: int, kind: int) -> Any:
            start, whole = offset + 12, super()._get_field_parts
            if kind != GGUFValueType.ARRAY:
                return whole(offset, kind)
            items, length = self._get(offset, np.uint32), self._get(offset + 4, np.uint64)
            inner, count = GGUFValueType(items[0]), int(length[0])
            if count == 0 or inner == GGUFValueType.ARRAY:
                return whole(offset, kind)
            types = [GGUFValueType.ARRAY, inner]
            if inner == GGUFValueType.STRING:
                end, parts = self._strings(start, count)
                return end - offset, [items, length, *parts], [*range(3, 2 * count + 2, 2)], types
            values = self._get(start, self.gguf_scalar_to_np[inner], count)
            if len(values) < count:
                raise ValueError("it ends within its metadata")
            parts = [items, length, *values.reshape(-1, 1)]
            return start + values.nbytes - offset, parts, [*range(2, count + 2)], types

        def _strings(self, start: int, count: int) -> tuple[int, list[Any]]:
            """Return the end of consecutive strings, and the length and the bytes of each."""
            data, number, parts = self._plain, np.dtype(np.uint64).newbyteorder(self.byte_order), list[Any]()
            for _ in range(count):
                length = data[start : start + 8].view(number)
                end = start + 8 + int(length[0])
                parts += length, data[start + 8 : end]
                start = end
            return start, parts

    return PlainReader
