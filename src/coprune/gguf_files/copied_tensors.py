"""Quantise a file, copying tensors that earlier quants already contain.

Quants of one model share most tensors: all blocks, if only embeddings or tokens differ, and all tensors whose rows are not a
multiple of 256, where several types fall back to the same one. llama.cpp's quantiser copies a tensor that already has its
target type, so its source takes these tensors from an earlier file. The bytes written are the same.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from coprune.base.errors import BadInput
from coprune.gguf_files.llama_cpp import TOKEN_EMBEDDINGS, Quantisation, encoded_bytes, planned_types, quantize
from coprune.model.checkpoint.mapped_gguf import ggml_library


@dataclass(frozen=True)
class Quant:
    """A quantised file, and the float16 file that it was made from."""

    file: Path
    source: Path


def quantize_beside(
    earlier: Sequence[Quant], source: Path, target: Path, asked: Quantisation, until: float = math.inf
) -> None:
    """Quantise a float16 file to the same bytes as `quantize`, copying tensors from earlier quants.

    Args:
        earlier: quants with the same importance matrix.
        source: as for `quantize`.
        target: as for `quantize`; a temporary file is created beside it.
        asked: as for `quantize`.
        until: as for `quantize`.

    Raises:
        BadInput: llama.cpp reports an error, or a file cannot be read.
        OutOfTime: the deadline has passed.
    """
    own = _tensors(source) if earlier else {}
    known = _known(source, own, planned_types(source, asked), earlier) if earlier else {}
    if not known:
        quantize(source, target, asked, until)
        return
    mixed = target.with_name(f"{target.name}.mixed")
    try:
        _write(mixed, source, own, known)
        quantize(mixed, target, asked, until)
    finally:
        mixed.unlink(missing_ok=True)


def bytes_of_rows(source: Path, asked: Quantisation, left: int) -> int:
    """Return the bytes that removing tokens would save in a quant: those of embeddings and head beyond the first `left` rows.

    Raises as `quantize`.
    """
    from gguf import GGMLQuantizationType

    own, types = _tensors(source), planned_types(source, asked)
    tokens, found = own[TOKEN_EMBEDDINGS].shape[1], 0
    for name, stored in own.items():
        if stored.shape[1] == tokens and not name.startswith("blk."):
            kind = GGMLQuantizationType(types.get(name, stored.type)).name.lower()
            found += encoded_bytes((max(0, tokens - left), stored.shape[0]), kind)[0]
    return found


@dataclass(frozen=True)
class _Stored:
    """A tensor of a mapped file."""

    type: int
    """Its type, as ggml's number."""
    shape: tuple[int, ...]
    """Length of a row, number of rows, and further dimensions."""
    bytes: Any


def _known(
    source: Path, own: dict[str, _Stored], types: Mapping[str, int], earlier: Sequence[Quant]
) -> dict[str, _Stored]:
    """Return the tensors of earlier files that were made from the same values in the wanted types."""
    sources, found = {source: own}, dict[str, _Stored]()
    for quant in earlier:
        with suppress(FileNotFoundError):  # another worker may have deleted it
            made = _tensors(quant.file)
            if quant.source not in sources:
                sources[quant.source] = _tensors(quant.source)
            before = sources[quant.source]
            for name in types.keys() & made.keys() & before.keys() - found.keys():
                same = before[name].shape == own[name].shape and made[name].type == types[name]
                if same and (quant.source == source or np.array_equal(before[name].bytes, own[name].bytes)):
                    found[name] = made[name]
    return found


@cache
def _library() -> Any:
    """Return llama.cpp's ggml library, with types declared for the functions that read and write headers."""
    library = ggml_library()
    assert library is not None  # quantising requires it
    for name, result, arguments in (
        ("gguf_init_from_file", ctypes.c_void_p, [ctypes.c_char_p, _Opening]),
        ("gguf_free", None, [ctypes.c_void_p]),
        ("gguf_get_n_tensors", ctypes.c_int64, [ctypes.c_void_p]),
        ("gguf_get_data_offset", ctypes.c_size_t, [ctypes.c_void_p]),
        ("gguf_get_alignment", ctypes.c_size_t, [ctypes.c_void_p]),
        ("gguf_get_tensor_name", ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int64]),
        ("gguf_get_tensor_type", ctypes.c_int, [ctypes.c_void_p, ctypes.c_int64]),
        ("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), [ctypes.c_void_p, ctypes.c_int64]),
        ("gguf_get_tensor_offset", ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int64]),
        ("gguf_get_tensor_size", ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int64]),
        ("gguf_set_tensor_type", None, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]),
        ("gguf_write_to_file", ctypes.c_bool, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Opening(ctypes.Structure):
    """llama.cpp's gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


@contextmanager
def _header(file: Path) -> Iterator[Any]:
    """Read a file's metadata and list of tensors with llama.cpp. Raises BadInput if that fails."""
    header = _library().gguf_init_from_file(str(file).encode(), _Opening(True, None))
    if not header:
        raise BadInput(f"llama.cpp cannot read {file}", field="model", value=str(file))
    try:
        yield header
    finally:
        _library().gguf_free(header)


def _tensors(file: Path) -> dict[str, _Stored]:
    """Map a file's tensors by name, in its order. Raises FileNotFoundError, and BadInput if llama.cpp cannot read it."""
    mapped, library = np.memmap(file, dtype=np.uint8, mode="r"), _library()
    found = dict[str, _Stored]()
    with _header(file) as header:
        begin = library.gguf_get_data_offset(header)
        for number in range(library.gguf_get_n_tensors(header)):
            start = begin + library.gguf_get_tensor_offset(header, number)
            stored = mapped[start : start + library.gguf_get_tensor_size(header, number)]
            type = library.gguf_get_tensor_type(header, number)
            shape = tuple(library.gguf_get_tensor_ne(header, number)[:4])
            found[library.gguf_get_tensor_name(header, number).decode()] = _Stored(type, shape, stored)
    return found


def _write(target: Path, source: Path, own: Mapping[str, _Stored], known: Mapping[str, _Stored]) -> None:
    """Write a copy of a file with some tensors taken from other files. Raises BadInput if llama.cpp fails."""
    library = _library()
    with _header(source) as header:
        for name, stored in known.items():
            library.gguf_set_tensor_type(header, name.encode(), stored.type)
        if not library.gguf_write_to_file(header, str(target).encode(), True):
            raise BadInput(f"llama.cpp cannot write {target}", field="output", value=str(target))
        alignment = library.gguf_get_alignment(header)
    with target.open("ab") as stream:
        for name, stored in own.items():
            stream.write(known.get(name, stored).bytes)
            stream.write(bytes(-stream.tell() % alignment))
