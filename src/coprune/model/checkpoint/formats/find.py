"""Find the quantised weights of a checkpoint by names, types and shapes of what is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from coprune.base.errors import BadInput
from coprune.model.checkpoint.formats.grids import Bytes, Floats4, Floats8, Integers, Nibbles, Words
from coprune.model.checkpoint.formats.weight import CODES, FACTOR, SCALES, SHAPE, ZEROS, Form, Weight

_FLOATS8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_ACTIVATIONS = (
    *("input_scale", "input_global_scale", "input_zero_point", "activation_scale", "output_scale"),
    *("k_scale", "v_scale"),
)
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
        BadInput: codes have no scales, or these have a shape that does not fit.
    """
    found: dict[str, Weight] = {}
    for name, entry in entries.items():
        weight = _weight_at(quantization, entries, name, entry)
        if weight is not None:
            found[weight.name] = weight
    return found


def _weight_at(quantization: Mapping[str, Any], entries: Entries, name: str, entry: Stored) -> Weight | None:
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
    parts = _parts(entries, base, {CODES: "weight", SCALES: scale})
    form = (
        Form("INT8", Integers(8), Bytes(torch.int8))
        if entry.dtype == "I8"
        else Form(
            f"FP8 ({entry.dtype.removeprefix('F8_')})", Floats8(_FLOATS8[entry.dtype]), Bytes(_FLOATS8[entry.dtype])
        )
    )
    if entries[parts[SCALES]].dtype == "F8_E8M0":
        form = Form(form.label, form.grid, form.packing, exponents=True)
    return _weight(entries, f"{base}.weight", form, parts, _block_of(quantization))


def _mxfp4_experts(entries: Entries, base: str) -> Weight:
    """Return the experts of a gpt-oss layer, stored as one tensor with a row per output."""
    parts = {CODES: f"{base}_blocks", SCALES: f"{base}_scales"}
    blocks = entries[parts[CODES]]
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[-1] * 2 != _MXFP4_GROUP:
        raise BadInput(
            f"{parts[CODES]} has the shape {blocks.shape} of {blocks.dtype}, and MXFP4 is U8 in groups of 16 bytes"
        )
    form = Form("MXFP4", Floats4(), Nibbles(_MXFP4_GROUP // 2), exponents=True, transposed=True)
    return _weight(entries, base, form, parts, (1, _MXFP4_GROUP))


def _packed(quantization: Mapping[str, Any], entries: Entries, base: str, entry: Stored) -> Weight:
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
        raise BadInput(f"{base}.weight_packed is {entry.dtype}, and packed weights are I32 or U8")
    if f"{base}.weight_g_idx" in entries:
        raise BadInput(
            f"{base}.weight_g_idx sorts columns into groups by their order of activation, which coprune does not read",
            fix="use the unquantised checkpoint",
        )
    bits = _bits_of(quantization, base)
    roles = {CODES: "weight_packed", SCALES: "weight_scale", SHAPE: "weight_shape"}
    if f"{base}.weight_zero_point" in entries:
        roles[ZEROS] = "weight_zero_point"
    parts = _parts(entries, base, roles)
    form = Form(f"INT{bits}", Integers(bits), Words(bits))
    return _weight(entries, f"{base}.weight", form, parts, _block_of(quantization))


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
    """Return a weight from the shapes of its parts. Raises BadInput if these do not match."""
    codes, scales = entries[parts[CODES]], entries[parts[SCALES]]
    grouped = isinstance(form.packing, Nibbles) and form.packing.groups is not None
    matrix = codes.shape[:-1] if grouped else codes.shape
    if len(matrix) not in (2, 3) or 0 in matrix:
        raise BadInput(f"{parts[CODES]} has the shape {codes.shape}, and a weight is a matrix or a stack of them")
    if FACTOR in parts and math.prod(entries[parts[FACTOR]].shape) != 1:
        raise BadInput(
            f"{parts[FACTOR]} has the shape {entries[parts[FACTOR]].shape}, and one factor is for all scales"
        )
    rows, columns, lead = matrix[-2], form.packing.columns(matrix[-1]), matrix[0] if len(matrix) == 3 else None
    own = scales.shape[1:] if lead is not None and len(scales.shape) > 1 and scales.shape[0] == lead else scales.shape
    for size in ((rows, columns), (1, columns), block):
        if own == (-(-rows // size[0]), -(-columns // size[1])):
            return Weight(name, form, rows, columns, size, lead, parts)
    if own in ((), (1,)) and lead is None:
        return Weight(name, form, rows, columns, (rows, columns), lead, parts)
    if own == (rows,):
        return Weight(name, form, rows, columns, (1, columns), lead, parts)
    if (
        0 not in own and len(own) == 2 and own[0] == rows and columns % own[1] == 0
    ):  # groups that no configuration tells
        return Weight(name, form, rows, columns, (1, columns // own[1]), lead, parts)
    raise BadInput(
        f"{parts[SCALES]} has the shape {tuple(scales.shape)}, which fits no scales of {parts[CODES]} ({rows} × {columns})",
        fix="fetch or save the checkpoint again",
    )


def _block_of(quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Return the block that one scale is for, by the configuration: rows, columns. A scale for each row is found by itself."""
    said = quantization.get("weight_block_size")
    for group in _groups(quantization):
        weights = group.get("weights") or {}
        said = said or weights.get("block_structure")
        if isinstance(weights.get("group_size"), int) and weights["group_size"] > 0:
            said = said or (1, weights["group_size"])
    if said is None:
        return (128, 128)
    if not isinstance(said, (list, tuple)) or len(said) != 2 or not all(type(n) is int and n > 0 for n in said):
        raise BadInput(f"config.json says that a scale is for a block of {said!r}, and a block has rows and columns")
    return said[0], said[1]


def _bits_of(quantization: Mapping[str, Any], base: str) -> int:
    said = [(group.get("weights") or {}).get("num_bits") for group in _groups(quantization)]
    found = {bits for bits in said if isinstance(bits, int)}
    if len(found) != 1 or not found <= {4, 8}:
        known = "4 or 8 are known, the same for all"
        raise BadInput(f"config.json does not say in how many bits {base}.weight_packed is stored ({known})")
    return found.pop()


def _groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
