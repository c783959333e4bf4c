"""Partial conversion between a checkpoint's tensors and a model's parameters.

The two differ: names change, and the experts of a layer become one tensor. transformers' own code converts in both
directions; this module only finds which tensors belong together, so that one block can be converted without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.words import Set
from coprune.model.checkpoint.shards import DTYPES, TensorEntry
from coprune.model.transformers_private import (
    Renaming,
    conversions_of,
    conversions_to_revert,
    convert_into,
    in_natural_order,
    revert_conversion,
    set_conversions_to_revert,
    splits,
    tie_read_weights,
    tied_names,
    used_among,
    without_known_exceptions,
)


@dataclass(frozen=True)
class Renamed:
    """Tensors of the checkpoint that make up one parameter of the model (or several, named by the first).

    converted: whether their layout changes; if not, it is a single tensor, possibly renamed.
    """

    target: str
    originals: tuple[str, ...]
    converted: bool


class Conversion:
    """Conversion of one checkpoint's tensors to one model's parameters (which may be on the meta device)."""

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        """Match a checkpoint's tensors with the model's. names: of every tensor in the checkpoint.

        Raises BadInput if the checkpoint lacks weights that the model needs.
        """
        self._model = model
        self._mapping = conversions_of(model)
        self.groups, unknown = self._group(names)
        missing = self._missing(unknown)
        self.carried = sorted(unknown)
        """Tensors that the model does not load (such as layers for speculative decoding)."""
        self._used = used_among(self._mapping)
        if missing and not any(map(splits, self._used)):
            raise BadInput(
                f"the checkpoint lacks {len(missing)} weights of the model, first {min(missing)}",
                fix="is it complete?",
            )

    def _group(self, names: Iterable[str]) -> tuple[list[Renamed], dict[str, str]]:
        """Return the groups, and the tensors that the model lacks, with the names they would have in it."""
        known = self._model.state_dict()
        renaming = Renaming(self._model, self._mapping, known)
        originals: dict[str, list[str]] = {}
        converted: dict[str, bool] = {}
        unknown: dict[str, str] = {}
        for name in sorted(names, key=in_natural_order):
            key, changes = renaming.of(name)
            if key not in known and name in known:
                key, changes = name, False
            if key in known:
                originals.setdefault(key, []).append(name)
                converted[key] = changes
            else:
                unknown[name] = key
        return [Renamed(key, tuple(group), converted[key]) for key, group in originals.items()], unknown

    def _missing(self, unknown: Mapping[str, str]) -> set[str]:
        """Return the names that transformers would report as missing, without each model's exceptions."""
        covered = {group.target for group in self.groups}
        missing = self._model.state_dict().keys() - covered - tied_names(self._model)
        return without_known_exceptions(self._model, missing, unknown.values())[0]

    def load(self, tensors: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str) -> None:
        """Convert and load tensors of the checkpoint (or lazy slices of them) into the model.

        Raises BadInput where a shape differs from the configuration's or a conversion fails.
        """
        _convert_into(self._model, tensors, dtype, device, self._mapping)
        # Loading records only its own conversions for saving to revert, and here it loads part by part.
        set_conversions_to_revert(self._model, self._used)

    def revert(self, groups: Iterable[Renamed], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters under the checkpoint's names and in its layout.

        state: the model's tensors that the groups cover; of tied ones, one suffices. Raises UnsupportedModel if
        transformers' conversion does not restore the checkpoint's names.
        """
        plain = {group.target: group.originals[0] for group in groups if not group.converted}
        reverted = {original: state[key] for key, original in plain.items() if key in state}
        wanted = {original for group in groups if group.converted for original in group.originals}
        if wanted:
            rest = {key: tensor for key, tensor in state.items() if key not in plain}
            found = revert_conversion(self._model, rest)
            back = _match_names(found, wanted, self._model.base_model_prefix)
            if back is None:
                raise UnsupportedModel(
                    f"transformers cannot convert {min(found)} back to the checkpoint's {min(wanted)}, so the model "
                    "cannot be saved in the layout it came in",
                    fix=("load it whole with ", Set("stream", False)),
                )
            reverted |= back
        return reverted


def require_floats(model: PreTrainedModel, entries: Mapping[str, TensorEntry]) -> None:
    """Raise BadInput where a checkpoint holds codes (integers or 8-bit floats) for a floating-point parameter."""
    whole = [
        name
        for name, entry in entries.items()
        if (dtype := DTYPES.get(entry.dtype)) is not None and not _is_plain(dtype)
    ]
    if not whole:
        return
    known = model.state_dict()
    renaming = Renaming(model, conversions_of(model), known)
    for name in whole:
        wanted = known.get(renaming.of(name)[0], known.get(name))
        if wanted is not None and wanted.is_floating_point():
            raise BadInput(
                f"{entries[name].file} holds {name} in {entries[name].dtype}, which is a code and not a weight",
                fix="use a checkpoint of plain weights",
            )


def _is_plain(dtype: torch.dtype) -> bool:
    """Return whether a dtype can hold weights by itself; 8-bit floats need scales."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _match_names(found: Mapping[str, Tensor], wanted: set[str], prefix: str) -> dict[str, Tensor] | None:
    """Match tensors with the wanted names; a checkpoint may lack or add the base model's prefix."""
    spellings: list[Callable[[str], str]] = [str, lambda n: n.removeprefix(f"{prefix}."), lambda n: f"{prefix}.{n}"]
    for spell in spellings:
        named = {spell(name): tensor for name, tensor in found.items()}
        if wanted <= named.keys():
            return {name: named[name] for name in wanted}
    return None


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Convert some tensors of a checkpoint and load them into a model in memory, keeping tied weights tied.

    device: of the tensors, if not the model's. Raises BadInput where a shape differs or a conversion fails.
    """
    held = model.get_parameter_or_buffer
    before, tied = conversions_to_revert(model), {name: held(name) for name in tied_names(model)}
    _convert_into(model, tensors, model.dtype, device or model.device, conversions_of(model))
    set_conversions_to_revert(model, before)
    replaced = {id(tensor) for name, tensor in tied.items() if held(name) is not tensor}
    stale = {name for name, tensor in tied.items() if held(name) is tensor and id(tensor) in replaced}
    if stale:
        tie_read_weights(model, stale)
    model.requires_grad_(False)


def _convert_into(
    model: PreTrainedModel, tensors: Mapping[str, Any], dtype: torch.dtype, device: Any, mapping: Iterable[Any]
) -> None:
    """Convert and load tensors (or lazy slices) with transformers, whose errors become BadInput."""
    info = convert_into(model, tensors, dtype, device, mapping)
    if info.mismatched_keys:
        name, found, expected = min(info.mismatched_keys)
        raise BadInput(f"{name} has shape {tuple(found)} where the configuration says {tuple(expected)}")
    for name, reason in info.conversion_errors.items():
        raise BadInput(f"{name} cannot be converted from the checkpoint: {reason.strip().splitlines()[-1]}")
