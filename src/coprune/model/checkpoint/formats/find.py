"""Find the quantised weights of a checkpoint by the names, dtypes and shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch

from coprune.base.errors import BadInput
from coprune.model.checkpoint.formats.configuration import Quantization
from coprune.model.checkpoint.formats.grids import Bytes, Floats4, Floats8, Integers, Nibbles, Words
from coprune.model.checkpoint.formats.weight import CODES, FACTOR, SCALES, SHAPE, ZEROS, Form, Weight

_FLOATS8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_ACTIVATIONS = (
    *("input_scale", "input_global_scale", "input_zero_point", "activation_scale", "output_scale", "output_zero_point"),
    *("q_scale", "k_scale", "v_scale"),
)
_FLOATS = ("F64", "F32", "F16", "BF16", *_FLOATS8)
_INTEGERS = ("I64", "I32")
_OF_WEIGHTS = ("weight_", "pre_quant_scale")
"""Prefixes of tensor names that occur only beside quantised weights."""
_MXFP4_GROUP, _NVFP4_GROUP = 32, 16


class Stored(Protocol):
    """A tensor in a file, as its header describes it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


Entries = Mapping[str, Stored]


def find_weights(quantization: Mapping[str, Any], entries: Entries) -> dict[str, Weight]:
    """Return the quantised weights among stored tensors, by their names in a dense checkpoint.

    Args:
        quantization: `quantization_config` of the checkpoint.
        entries: its tensors by name.

    Raises:
        BadInput: codes have no scales, parts have an unexpected dtype or shape, or a tensor beside a weight is not
            supported.
    """
    said, found = Quantization.read(quantization), dict[str, Weight]()
    for name, entry in entries.items():
        weight = _weight_at(said, entries, name, entry)
        if weight is not None:
            found[weight.name] = weight
    used = {part for weight in found.values() for part in weight.parts.values()}
    refuse_unread(entries, used, [_beside(weight) for weight in found.values()])
    return found


def refuse_unread(entries: Entries, used: Collection[str], beside: Iterable[str]) -> None:
    """Raise BadInput for a stored tensor that affects a weight's values but that no decoder reads.

    Args:
        entries: the tensors of a checkpoint by name.
        used: names of those that are read.
        beside: for each decoded weight, the prefix of the names of everything stored with it.
    """
    places = set(beside)
    for name, entry in entries.items():
        if name in used or name.endswith("bias"):
            continue
        place, _, last = name.rpartition(".")
        plain = last.startswith(_OF_WEIGHTS) and f"{place}.weight" in entries
        undecoded = entry.dtype in _FLOATS8
        if plain or undecoded or f"{place}." in places or any(f"{name[:at]}_" in places for at in _underscores(name)):
            raise BadInput(
                f"{name} ({entry.dtype}) belongs to a quantised weight, but coprune does not know how to read it",
                fix="use the unquantised checkpoint",
            )


def _underscores(name: str) -> Iterator[int]:
    return (at for at, letter in enumerate(name) if letter == "_")


def _beside(weight: Weight) -> str:
    """Return the prefix of the names of everything that is stored with a weight."""
    if weight.parts[CODES].endswith("_blocks"):
        return f"{weight.name}_"
    return weight.name.removesuffix("weight")


def _weight_at(quantization: Quantization, entries: Entries, name: str, entry: Stored) -> Weight | None:
    """Return the weight whose codes a tensor holds, or None."""
    if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in entries:
        return _mxfp4_experts(entries, name.removesuffix("_blocks"))
    base, _, last = name.rpartition(".")
    if last == "weight_packed":
        return _packed(quantization, entries, base, entry)
    if last != "weight" or entry.dtype not in (*_FLOATS8, "I8", "U8"):
        return None
    if entry.dtype == "U8":
        parts = _parts(entries, base, {CODES: "weight", SCALES: "weight_scale", FACTOR: "weight_scale_2"})
        form = Form("NVFP4", Floats4(), Nibbles())
        return _weight(entries, f"{base}.weight", form, parts, (1, _NVFP4_GROUP))
    scale = "weight_scale_inv" if f"{base}.weight_scale_inv" in entries else "weight_scale"
    parts = _parts(entries, base, {CODES: "weight", SCALES: scale} | _zero_points(entries, base))
    form = (
        Form("INT8", Integers(8), Bytes(torch.int8))
        if entry.dtype == "I8"
        else Form(
            f"FP8 ({entry.dtype.removeprefix('F8_')})", Floats8(_FLOATS8[entry.dtype]), Bytes(_FLOATS8[entry.dtype])
        )
    )
    if entries[parts[SCALES]].dtype == "F8_E8M0":
        form = Form(form.label, form.grid, form.packing, exponents=True)
    return _weight(entries, f"{base}.weight", form, parts, quantization.block)


def _mxfp4_experts(entries: Entries, base: str) -> Weight:
    """Return the experts of a gpt-oss layer, stored as one tensor with a row per output."""
    parts = {CODES: f"{base}_blocks", SCALES: f"{base}_scales"}
    blocks = entries[parts[CODES]]
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[-1] * 2 != _MXFP4_GROUP:
        raise BadInput(
            f"{parts[CODES]} has the shape {blocks.shape} of {blocks.dtype}, but MXFP4 is U8 in groups of 16 bytes"
        )
    form = Form("MXFP4", Floats4(), Nibbles(_MXFP4_GROUP // 2), exponents=True, transposed=True)
    return _weight(entries, base, form, parts, (1, _MXFP4_GROUP))


def _packed(quantization: Quantization, entries: Entries, base: str, entry: Stored) -> Weight:
    """Return a weight packed by compressed-tensors: FP4 in bytes, or integers in words of 32 bits."""
    if entry.dtype == "U8":
        if f"{base}.weight_global_scale" in entries:
            roles = {CODES: "weight_packed", SCALES: "weight_scale", FACTOR: "weight_global_scale"}
            form, group = Form("NVFP4", Floats4(), Nibbles(), divided=True), _NVFP4_GROUP
        else:
            roles = {CODES: "weight_packed", SCALES: "weight_scale"}
            form, group = Form("MXFP4", Floats4(), Nibbles(), exponents=True), _MXFP4_GROUP
        return _weight(entries, f"{base}.weight", form, _parts(entries, base, roles), (1, group))
    if entry.dtype != "I32":
        raise BadInput(f"{base}.weight_packed is {entry.dtype}, but packed weights are I32 or U8")
    if f"{base}.weight_g_idx" in entries:
        raise BadInput(
            f"{base}.weight_g_idx sorts columns into groups by activation order, which is not supported",
            fix="use the unquantised checkpoint",
        )
    bits = _bits_of(quantization, base)
    roles = {CODES: "weight_packed", SCALES: "weight_scale", SHAPE: "weight_shape"}
    parts = _parts(entries, base, roles | _zero_points(entries, base))
    form = Form(f"INT{bits}", Integers(bits), Words(bits))
    return _weight(entries, f"{base}.weight", form, parts, quantization.block)


def _zero_points(entries: Entries, base: str) -> dict[str, str]:
    """Return the name of the zero points of asymmetric codes, where there are any."""
    return {ZEROS: "weight_zero_point"} if f"{base}.weight_zero_point" in entries else {}


def _parts(entries: Entries, base: str, roles: Mapping[str, str]) -> dict[str, str]:
    """Return the names of a weight's parts and of its activation scales. Raises BadInput if one is missing."""
    found = {role: f"{base}.{last}" for role, last in roles.items()}
    for role, name in found.items():
        if name not in entries:
            raise BadInput(
                f"the checkpoint holds {found[CODES]} in {entries[found[CODES]].dtype} and lacks {name}, its {role}",
                fix="fetch or save the checkpoint again",
            )
    beside = {f"{base}.{last}": f"{base}.{last}" for last in _ACTIVATIONS if f"{base}.{last}" in entries}
    return found | beside


def _weight(entries: Entries, name: str, form: Form, parts: dict[str, str], block: tuple[int, int]) -> Weight:
    """Return a weight from the shapes of its parts. Raises BadInput if these, or their types, do not match."""
    codes = entries[parts[CODES]]
    grouped = isinstance(form.packing, Nibbles) and form.packing.groups is not None
    matrix = codes.shape[:-1] if grouped else codes.shape
    if len(matrix) not in (2, 3) or 0 in matrix:
        raise BadInput(f"{parts[CODES]} has the shape {codes.shape}, but a weight is a matrix or a stack of matrices")
    rows, columns, lead = matrix[-2], form.packing.columns(matrix[-1]), matrix[0] if len(matrix) == 3 else None
    _require_types(entries, form, parts)
    if FACTOR in parts and math.prod(entries[parts[FACTOR]].shape) != 1:
        raise BadInput(f"{parts[FACTOR]} has the shape {entries[parts[FACTOR]].shape}, but all scales share one factor")
    if SHAPE in parts and entries[parts[SHAPE]].shape not in ((2,), (len(matrix),)):
        raise BadInput(f"{parts[SHAPE]} has {entries[parts[SHAPE]].shape} entries for the shape of a weight")
    weight = Weight(name, form, rows, columns, _size(entries, parts, (rows, columns, lead), block), lead, parts)
    if ZEROS in parts:
        _require_zero_points(weight, entries[parts[ZEROS]], entries[parts[SCALES]].shape)
    return weight


def _size(
    entries: Entries, parts: Mapping[str, str], of: tuple[int, int, int | None], block: tuple[int, int]
) -> tuple[int, int]:
    """Return the rows × columns that share a scale. of: rows, columns and length of the stack."""
    (rows, columns, lead), scales = of, entries[parts[SCALES]]
    own = scales.shape[1:] if lead is not None and len(scales.shape) > 1 and scales.shape[0] == lead else scales.shape
    for size in ((rows, columns), (1, columns), block):
        if own == (-(-rows // size[0]), -(-columns // size[1])):
            return size
    if own in ((), (1,)) and lead is None:
        return rows, columns
    if own == (rows,):
        return 1, columns
    # Groups that the configuration does not mention.
    if len(own) == 2 and 0 not in own and own[0] == rows and columns % own[1] == 0:
        return 1, columns // own[1]
    raise BadInput(
        f"{parts[SCALES]} has the shape {tuple(scales.shape)}, which does not fit {parts[CODES]} ({rows} × {columns})",
        fix="fetch or save the checkpoint again",
    )


def _require_types(entries: Entries, form: Form, parts: Mapping[str, str]) -> None:
    codes = entries[parts[CODES]].dtype
    allowed = {
        SCALES: ("U8", "F8_E8M0") if form.exponents else _FLOATS,
        FACTOR: _FLOATS,
        SHAPE: _INTEGERS,
        ZEROS: (codes,) if isinstance(form.packing, Bytes) else ("I32", "I8"),
    }
    for role, letters in allowed.items():
        if role in parts and (dtype := entries[parts[role]].dtype) not in letters:
            raise BadInput(
                f"{parts[role]} is {dtype}, but {role} of {form.label} are {' or '.join(letters)}",
                fix="fetch or save the checkpoint again",
            )


def _require_zero_points(weight: Weight, zeros: Stored, scales: tuple[int, ...]) -> None:
    """Raise BadInput unless there is one zero point per scale."""
    expected = scales
    if isinstance(weight.form.packing, Words) and zeros.dtype == "I32":
        rows = -(-weight.rows // weight.form.packing.each)
        expected = (*(() if weight.lead is None else (weight.lead,)), rows, -(-weight.columns // weight.block[1]))
    if zeros.shape != expected:
        raise BadInput(
            f"{weight.parts[ZEROS]} has the shape {tuple(zeros.shape)}, but its scales call for {expected}",
            fix="fetch or save the checkpoint again",
        )


def _bits_of(quantization: Quantization, base: str) -> int:
    found = {weights.num_bits for weights in quantization.weights if weights.num_bits is not None}
    if len(found) != 1 or not found <= {4, 8}:
        known = "4 or 8 are supported, the same for all"
        raise BadInput(f"config.json does not say in how many bits {base}.weight_packed is stored ({known})")
    return found.pop()
