"""The encoding of a quantised checkpoint, preserved by a run: read as dense weights, written back on its grid.

Other modules see *decoded entries*: dense names and shapes whose values are decoded when they are read. Where values are
unchanged a run writes the source's codes, so that those bytes stay the same.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.model.checkpoint.deferred import untouched
from coprune.model.checkpoint.encoding import Encoding, Place, keep_place
from coprune.model.checkpoint.formats import Rounding, Weight, find_weights
from coprune.model.checkpoint.formats.by_input import PARTS, ByInput, bases_of, by_input
from coprune.model.checkpoint.formats.configuration import Quantization
from coprune.model.checkpoint.formats.find import refuse_unread
from coprune.model.checkpoint.formats.weight import STACKED
from coprune.model.checkpoint.names import MODELOPT_FILE, kinds_of
from coprune.model.checkpoint.shards import DTYPES, Buffer, TensorEntry, read_json, read_tensor, stored_entries
from coprune.model.kept_slices import KeptSlices

READABLE = ("compressed-tensors", "fbgemm_fp8", "fp8", "modelopt", "mxfp4")
"""Values of `quant_method` that are read, and written in the same format."""
READ_ONLY = ("gptq", "awq")
"""Values of `quant_method` that are read but not written."""
_WHY_NOT = {
    "bitsandbytes": "its blocks cross rows, and its scales are quantised too",
    "torchao": "its tensors are parts of Python objects",
}
_LETTERS = {dtype: letters for letters, dtype in DTYPES.items()}
_LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")
"""Configuration keys that list unquantised layers."""


@dataclass(frozen=True)
class DecodedEntry(TensorEntry):
    """A dense weight, decoded from several stored tensors when it is read."""

    weight: Weight
    parts: tuple[tuple[str, TensorEntry], ...]
    """The stored tensors by role."""

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return tuple(entry for _, entry in self.parts)

    def at(self, index: int) -> TensorEntry | None:
        own = [(role, entry.at(index) if role in STACKED else entry) for role, entry in self.parts]
        parts = tuple((role, entry) for role, entry in own if entry is not None)
        return replace(
            self,
            shape=self.shape[1:],
            start=parts[0][1].start,
            nbytes=self.nbytes // self.shape[0],
            weight=replace(self.weight, lead=None),
            parts=parts,
        )

    def read(self, buffer: Buffer) -> Tensor:
        return self.weight.decode(self.read_parts(), buffer(self.shape, DTYPES[self.dtype]))

    def read_parts(self) -> dict[str, Tensor]:
        """Read the stored tensors. Raises BadInput as `read_tensor`."""
        return {role: read_tensor(entry) for role, entry in self.parts}


class SourceEncoding(Encoding):
    """Encoding of a quantised checkpoint. entries: content of its files, by name."""

    name = "source"

    def __init__(self, quantization: Mapping[str, Any], entries: Mapping[str, TensorEntry], dtype: torch.dtype) -> None:
        """Find the quantised weights. dtype: to decode to. Raises BadInput for damaged parts of a weight."""
        self._quantization = quantization
        self.dtype = dtype
        self.entries = self.decoded(entries)
        """Every tensor, as in a dense checkpoint."""

    @property
    def weights(self) -> dict[str, DecodedEntry]:
        """The quantised weights by their dense names."""
        return {name: entry for name, entry in self.entries.items() if isinstance(entry, DecodedEntry)}

    @property
    def method(self) -> str:
        """The method's name in the configuration."""
        return str(self._quantization.get("quant_method"))

    def decoded(self, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Replace the stored tensors of quantised weights by dense entries. Raises BadInput for damaged ones."""
        weights = find_weights(self._quantization, entries)
        used = {part for weight in weights.values() for part in weight.parts.values()}
        dense = {name: entry for name, entry in entries.items() if name not in used}
        return dense | {name: self._entry(weight, entries) for name, weight in weights.items()}

    def _entry(self, weight: Weight, entries: Mapping[str, TensorEntry]) -> DecodedEntry:
        parts = tuple((role, entries[name]) for role, name in weight.parts.items())
        codes, nbytes = parts[0][1], math.prod(weight.shape) * self.dtype.itemsize
        return DecodedEntry(codes.file, _LETTERS[self.dtype], weight.shape, codes.start, nbytes, weight, parts)

    def store(self, name: str, tensor: Tensor, kept: Sequence[KeptSlices]) -> tuple[dict[str, Tensor], Rounding]:
        entry = self.entries.get(name)
        if not isinstance(entry, DecodedEntry):
            return super().store(name, tensor, kept)
        parts, rounding = entry.read_parts(), Rounding()
        if not untouched(tensor, entry):
            parts, rounding = entry.weight.encode(tensor, parts)
        for one in kept:
            parts = entry.weight.cut(parts, one)
        return {entry.weight.parts[role]: part for role, part in parts.items()}, rounding

    def require_cut(self, name: str, kept: KeptSlices) -> None:
        entry = self.entries.get(name)
        if isinstance(entry, DecodedEntry):
            entry.weight.require_cut(kept)

    def bytes_of(self, dense: int) -> int:
        return dense + sum(sum(e.nbytes for e in entry.stored) - entry.nbytes for entry in self.weights.values())

    def configure(self, config: dict[str, Any], place: Place = keep_place) -> None:
        _place_layers(quantization_of(config) or {}, place)

    def complete(self, folder: Path, place: Place) -> None:
        file = folder / MODELOPT_FILE
        if file.is_file():
            content = read_json(file)
            _place_layers(content.get("quantization", {}), place)
            write_text(file, json.dumps(content, indent=2) + "\n")

    def lines(self) -> list[str]:
        """Return a line per kind of quantised weight: its format, and the steps in which it can be cut."""
        names = defaultdict[str, list[str]](list)
        for name, entry in self.weights.items():
            names[entry.weight.label].append(name)
        return [f"{kind}: {label}" for label, own in names.items() for kind in kinds_of(own)]


@dataclass(frozen=True)
class ByInputEntry(TensorEntry):
    """A dense weight, decoded from GPTQ's or AWQ's tensors when it is read."""

    form: ByInput
    base: str
    parts: tuple[tuple[str, TensorEntry], ...]

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return tuple(entry for _, entry in self.parts)

    def at(self, index: int) -> None:
        return None

    def read(self, buffer: Buffer) -> Tensor:
        parts = {last: read_tensor(entry) for last, entry in self.parts}
        try:
            return self.form.decode(parts, buffer(self.shape, DTYPES[self.dtype]))
        except BadInput as error:
            raise error.within(self.base) from error


class ReadOnly(SourceEncoding):
    """Encoding of a GPTQ or AWQ checkpoint, which is written as plain values."""

    name = Encoding.name
    store, require_cut, bytes_of = Encoding.store, Encoding.require_cut, Encoding.bytes_of
    configure, complete = Encoding.configure, Encoding.complete

    def decoded(self, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
        form = by_input(self._quantization)
        dense, used = dict[str, TensorEntry](), set[str]()
        for base in bases_of(entries):
            parts = tuple((last, entries[f"{base}.{last}"]) for last in PARTS if f"{base}.{last}" in entries)
            shape, first = form.shape(base, entries), parts[0][1]
            used |= {f"{base}.{last}" for last, _ in parts}
            nbytes = math.prod(shape) * self.dtype.itemsize
            dense[f"{base}.weight"] = ByInputEntry(
                first.file, _LETTERS[self.dtype], shape, first.start, nbytes, form, base, parts
            )
        refuse_unread(entries, used, [f"{base}." for base in bases_of(entries)])
        return {name: entry for name, entry in entries.items() if name not in used} | dense

    def lines(self) -> list[str]:
        names = [name for name, entry in self.entries.items() if isinstance(entry, ByInputEntry)]
        return [f"{kind}: {by_input(self._quantization).label}" for kind in kinds_of(names)]


def _place_layers(said: Any, place: Place) -> None:
    """Rename the layers in lists of unquantised layers, in place."""
    for key in _LISTS:
        if isinstance(said, dict) and isinstance(listed := said.get(key), list):
            said[key] = [left for name in listed if (left := place(str(name))) is not None]


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the quantisation settings in the content of `config.json`; None if there are none."""
    for said in (config, config.get("text_config")):
        if isinstance(said, Mapping):
            found = said.get("quantization_config") or said.get("compression_config")
            if isinstance(found, dict):
                return found
    return None


_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.25, "nvfp4": 4.5}
"""Bits per value, including its share of a scale, by method or algorithm."""


def stored_share(said: Mapping[str, Any] | None, itemsize: int) -> float:
    """Return the stored size of weights relative to their decoded size; 1 without quantisation.

    Args:
        said: the quantisation settings.
        itemsize: bytes per decoded value.
    """
    found = Quantization.read(said or {})
    numbers = [weights.num_bits for weights in found.weights if weights.num_bits is not None]
    bits = max(numbers) + 0.5 if numbers else _BITS.get(str(found.quant_algo or found.quant_method).lower())
    return 1.0 if bits is None else min(1.0, bits / 8 / itemsize)


def is_quantised(folder: Path) -> bool:
    """Return whether a folder's configuration declares quantised weights."""
    return quantization_of(read_json(folder / "config.json")) is not None


def source_encoding(folder: Path, dtype: torch.dtype | None = None) -> SourceEncoding | None:
    """Return the encoding of a folder's checkpoint; None if its tensors are dense.

    dtype: to decode weights to; None for the configuration's own.

    Raises:
        BadInput: the quantisation is not supported, or the checkpoint is damaged.
    """
    config = read_json(folder / "config.json")
    found = quantization_of(config)
    if found is None:
        if config.get("quantization_config"):
            raise BadInput(f"{folder / 'config.json'} has a quantization_config that is not a mapping")
        return None
    method = found.get("quant_method", "compressed-tensors" if "compression_config" in config else None)
    if method in READ_ONLY:
        return ReadOnly(found, stored_entries(folder), dtype or _own_dtype(config))
    if method not in READABLE:
        why = _WHY_NOT.get(str(method), "coprune does not know how")
        raise BadInput(
            f"{folder.name} is quantised ({method}), which is not supported: {why}",
            field="model",
            value=str(folder),
            fix=("use the unquantised checkpoint, or dequantise it with transformers and save it with save_pretrained"),
        )
    return SourceEncoding(found, stored_entries(folder), dtype or _own_dtype(config))


def _own_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the compute dtype of a configuration; bfloat16 if it names none or an unsuitable one."""
    said = [one.get(key) for one in (config, config.get("text_config")) if isinstance(one, Mapping) for key in _DTYPES]
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return next((known[str(name)] for name in said if str(name) in known), torch.bfloat16)


_DTYPES = ("dtype", "torch_dtype")


def checkpoint_entries(folder: Path) -> dict[str, TensorEntry]:
    """Return every tensor of the checkpoint by name, quantised weights as dense ones.

    Raises BadInput for a damaged shard, a tensor that the index names but its file lacks, or unsupported quantisation.
    """
    source = source_encoding(folder) if (folder / "config.json").is_file() else None
    return stored_entries(folder) if source is None else source.entries
