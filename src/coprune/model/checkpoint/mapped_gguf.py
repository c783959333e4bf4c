"""A GGUF file, possibly in parts, as a model whose blocks are decoded when they are needed.

The file is memory-mapped, so the system can reclaim its pages. transformers' tables say which tensors make up a parameter and
how they are transformed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput
from coprune.model.checkpoint.companions import Companions, save_companions
from coprune.model.checkpoint.gguf_header import gguf_parts
from coprune.model.checkpoint.gguf_reader import gguf_reader, reading_once
from coprune.model.checkpoint.lazy import LazyCheckpoint, ahead_to, build_skeleton
from coprune.model.checkpoint.load import explained, quiet_transformers
from coprune.model.checkpoint.locate import GgufFile, Location, ModelFolder
from coprune.model.checkpoint.names import LLAMA_CPP
from coprune.model.checkpoint.shards import DTYPES, Buffer, TensorEntry, read_tensor
from coprune.model.checkpoint.source import Source
from coprune.model.transformers_private import GgufNames, gguf_names, revert_conversion, set_conversions_to_revert
from coprune.recipe.parts import DtypeName

_LETTERS = {dtype: letters for letters, dtype in DTYPES.items()}
_STRETCH = 1 << 22
"""Number of weights decoded at a time, to keep temporary buffers small."""


class MappedGguf:
    """All tensors of a GGUF file, possibly in parts, mapped but not read."""

    def __init__(self, file: GgufFile, field: str = "model") -> None:
        """Map a file and its parts. field: the setting that named it. Raises BadInput if a part cannot be read."""
        self.parts = {part: gguf_reader(part, field) for part in gguf_parts(file.path)}
        self.first: Any = next(iter(self.parts.values()))
        """The reader of the part with the metadata."""
        self.tensors: list[Any] = [stored for reader in self.parts.values() for stored in reader.tensors]
        names = Counter(stored.name for stored in self.tensors)
        if twice := [name for name, count in names.items() if count > 1]:
            raise BadInput(
                f"the parts of {file.name} hold {twice[0]} more than once",
                field=field,
                value=file.name,
                fix="fetch them again",
            )

    def let_go(self) -> None:
        """Release the pages that were read, which would count as this process's memory."""
        for reader in self.parts.values():
            _let_go(reader.data)


def _let_go(data: Any) -> None:
    """Release the pages read from the file behind an array."""
    while data is not None:
        mapped = getattr(data, "_mmap", None)
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
        data = getattr(data, "base", None)


@cache
def ggml_library() -> ctypes.CDLL | None:
    """Return llama.cpp's ggml library if installed, which decodes much faster than the gguf package."""
    found = importlib.util.find_spec(LLAMA_CPP)
    for place in () if found is None else found.submodule_search_locations or ():
        for file in sorted(Path(place).glob("*ggml-base*")):
            with suppress(OSError):
                return ctypes.CDLL(str(file))
    return None


def _native(kind: str) -> Callable[[int, int, int], None] | None:
    """Return llama.cpp's decoder of a type (source address, target address, number of values), or None without one."""
    library, name = ggml_library(), kind.lower()
    spelled = re.sub(r"_k$", "_K", name)
    function = None if library is None else getattr(library, f"dequantize_row_{spelled}", None)
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None

    def decode(source: int, target: int, count: int) -> None:
        function(source, target, count)

    return decode


def decode_into(stored: Any, rows: Any, out: Tensor) -> None:
    """Decode rows of a GGUF tensor.

    Args:
        stored: the tensor, from the gguf package's reader.
        rows: the bytes of some of its rows, outermost axis first.
        out: contiguous float32 of the same number of values.
    """
    from gguf import quants

    native, flat = _native(stored.tensor_type.name), out.reshape(-1)
    rows = rows.reshape(-1, rows.shape[-1])
    width = flat.numel() // max(1, len(rows))
    step = max(1, _STRETCH // max(1, width))
    for start in range(0, len(rows), step):
        some = np.ascontiguousarray(rows[start : start + step])
        part = flat[start * width : (start + len(some)) * width]
        if native is not None:
            native(some.ctypes.data, part.data_ptr(), part.numel())
        else:
            part.numpy()[:] = quants.dequantize(some, stored.tensor_type).reshape(-1)
    _let_go(stored.data)  # else its pages count as this process's memory


def shape_of(stored: Any) -> list[int]:
    """Return the shape of a tensor from the gguf package's reader, row length last."""
    return [int(size) for size in reversed(stored.shape)]


def decode(stored: Any) -> Tensor:
    """Decode a tensor from the gguf package's reader to float32."""
    out = torch.empty(shape_of(stored))
    decode_into(stored, stored.data, out)
    return out


@dataclass(frozen=True)
class GgufEntry(TensorEntry):
    """A parameter, decoded from one or more GGUF tensors when it is read."""

    parts: tuple[TensorEntry, ...]
    """Locations of the tensors."""
    tensors: tuple[Any, ...] = field(compare=False, repr=False)
    """The tensors, from the gguf package's reader."""
    names: GgufNames = field(compare=False, repr=False)
    row: int | None = None
    """Index along their first axis; None for all."""

    def at(self, index: int) -> GgufEntry | None:
        if any(len(stored.data) != self.shape[0] for stored in self.tensors):
            return None
        return replace(self, shape=self.shape[1:], nbytes=self.nbytes // self.shape[0], row=index)

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return self.parts

    def read(self, buffer: Buffer) -> Tensor:
        out = buffer(self.shape, DTYPES[self.dtype])
        if self.row is not None:
            self._read_into(out[None], slice(self.row, self.row + 1))
        elif len(self.shape) == 3 and all(len(stored.data) == self.shape[0] for stored in self.tensors):
            # A layer's experts one at a time, since they are most of its size.
            for index in range(self.shape[0]):
                self._read_into(out[index : index + 1], slice(index, index + 1))
        else:
            self._read_into(out, slice(None))
        return out

    def _read_into(self, out: Tensor, rows: slice) -> None:
        """Decode a range of the first axis. Raises BadInput if it does not exactly fill `out`."""
        found: Tensor | None = None
        parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        for stored in self.tensors:
            shape = shape_of(stored)
            shape[0] = len(range(*rows.indices(shape[0])))
            direct = out.dtype == torch.float32 and len(self.tensors) == 1 and shape == [*out.shape]
            values = out if direct else torch.empty(shape)
            decode_into(stored, stored.data[rows], values)
            found = self.names.arrange(stored.name, values, parsed)
        assert found is not None
        if found.shape != out.shape:
            raise _misfit(self.tensors[0], out.shape)
        if (found.data_ptr(), found.stride(), found.dtype) != (out.data_ptr(), out.stride(), out.dtype):
            out.copy_(found)


def _misfit(stored: Any, shape: Sequence[int]) -> BadInput:
    return BadInput(
        f"{stored.name} has the shape {tuple(shape_of(stored))}, but the configuration calls for {tuple(shape)}",
        field="model",
    )


class LazyGguf(LazyCheckpoint):
    """The model of a GGUF file, streamed, in float32 unless another dtype is requested; implements `weights.Weights`.

    Raises BadInput if the file is damaged, or if transformers cannot map its tensors to parameters.
    """

    def __init__(
        self,
        location: GgufFile,
        dtype: DtypeName = "auto",
        device: torch.device | str = "cpu",
        experts_apart: bool = False,
    ) -> None:
        self._apart = experts_apart and in_host_memory(torch.device(device))
        self.stored_as, self._uncut = None, {}
        self.location, self.device = ModelFolder(location.path.parent, location.name), torch.device(device)
        self.dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        self._mapped = MappedGguf(location)
        self._ahead = ahead_to(self.device)
        with quiet_transformers(), explained(location):
            self._model, names = _skeleton(location, self._mapped, self.dtype, self.device)
        self._entries = dict(self._entries_of(names))
        self.source = Source(self.location, self._model, dtype, self._entries)

    def _entries_of(self, names: GgufNames) -> Iterator[tuple[str, TensorEntry]]:
        made_of: dict[str, list[tuple[TensorEntry, Any]]] = {}
        for file, reader in self._mapped.parts.items():
            for stored in reader.tensors:
                place = TensorEntry(file, "U8", tuple(stored.data.shape), int(stored.data_offset), int(stored.n_bytes))
                if (parameter := names.parameter(stored.name)) is not None:
                    made_of.setdefault(parameter, []).append((place, stored))
        for parameter, tensor in self._model.state_dict().items():
            if parameter in made_of:
                dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
                parts, tensors = zip(*made_of[parameter], strict=True)
                if sum(math.prod(shape_of(stored)) for stored in tensors) != tensor.numel():
                    raise _misfit(tensors[0], tensor.shape)
                whole = (tuple(tensor.shape), parts[0].start, math.prod(tensor.shape) * dtype.itemsize)
                yield parameter, GgufEntry(parts[0].file, _LETTERS[dtype], *whole, parts, tensors, names)

    def parameter(self, name: str) -> Tensor:
        """Read a single parameter."""
        return read_tensor(self._entries[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors under the names that transformers would save them by; most are read lazily."""
        set_conversions_to_revert(self._model, None)
        state = {name: self._unread(name, apart=True)[...] for name in self._entries}
        return revert_conversion(self._model, state)

    def in_file(self, changes: Mapping[str, Any]) -> dict[str, Any] | None:
        return dict(changes)

    def write_companions(self, folder: Path, beside: Companions) -> None:
        save_companions(self._model, beside.processor, folder)


@reading_once
def _skeleton(
    location: Location, mapped: MappedGguf, dtype: torch.dtype, device: torch.device, /
) -> tuple[PreTrainedModel, GgufNames]:
    """Return the model without weights, and the names of the tensors behind its parameters."""
    file = next(iter(mapped.parts))
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    # Transformers reads only the first part.
    config.tie_word_embeddings = config.tie_word_embeddings and all(t.name != "output.weight" for t in mapped.tensors)
    folder = ModelFolder(location.path.parent, location.name)
    model = build_skeleton(folder, config, dtype, device)
    return model, gguf_names(file, model)
