"""Silent units of a model: channels and heads of zeros, which a GGUF file need not store.

A folder whose blocks differ in width stores all of them as wide as the widest, since its configuration has one number.
Structure, proven as for `prune --remove`, tells which rows and columns belong together; values tell which are silent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coprune.gguf_files.smaller import Exported
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.edit import Configure, Edit, KeepSlices
from coprune.model.edits import Edits
from coprune.model.folding import head_size
from coprune.model.matrix_choice import choose_matrices
from coprune.model.removed import Fewer, SilentUnits
from coprune.model.saved_slices import slices_kept
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.model.walk.prove import prove_replay
from coprune.removal.channels_and_heads import Kind, Part, filled, find_parts, step_of, together
from coprune.removal.smaller_model import Resized, possible_changes

_ALIGN = 64
"""Channels are kept in multiples of this, as with `--align`, for types with blocks of 32."""
Silence = Mapping[str, Sequence[tuple[Part, Sequence[Tensor]]]]
"""Parts of each block, with each consumer's silent units."""
_Size = tuple[Kind, int]
"""A kind of parts with its number of units."""


@dataclass(frozen=True)
class Narrow:
    """A model without its silent units."""

    alike: Exported
    """The model at the smallest width common to all blocks."""
    apart: Exported | None
    """The model with each block at its own width; None if that is the same."""


def narrowed(source: Exported) -> Narrow:
    """Remove the silent units of a folder's model.

    Raises:
        UnsupportedModel, BadInput, NumericalError: its blocks cannot be walked or loaded.
    """
    if not isinstance(source.location, ModelFolder) or not any(_has_zeros(source, name) for name in source.tensors):
        return Narrow(source, None)
    model = _proven(source.location)
    silence: dict[str, list[tuple[Part, list[Tensor]]]] = {
        name: [(part, part.silent()) for part in parts] for name, parts in find_parts(model)
    }
    silence = {name: [(part, own) for part, own in found if not _all_silent(own)] for name, found in silence.items()}
    widths: dict[_Size, list[int]] = defaultdict(list)
    for part, silent in (pair for found in silence.values() for pair in found):
        widths[part.kind, part.count].append(_width(part, silent))
    common = {size: max(own) for size, own in widths.items()}
    told = _changes(source, model, silence, common) if any(common[size] < size[1] for size in common) else {}
    apart = None
    if any(len({*own}) > 1 for own in widths.values()):
        edits = _edits(model, silence, None)
        apart = source.without(_configured(edits, told, widths))
    if told:
        edits = _edits(model, silence, common)
        source = source.without(_configured(edits, told, {size: [width] for size, width in common.items()}))
    return Narrow(source, apart)


def _all_silent(silent: Sequence[Tensor]) -> bool:
    return all(bool(own.all()) for own in silent)


def _has_zeros(source: Exported, name: str) -> bool:
    """Return whether a tensor has an all-zero row or column; without one no unit is silent."""
    if len(source.tensors[name].shape) < 2:
        return False
    zero = source.tensor(name) == 0
    return bool(zero.all(dim=-1).any()) or bool(zero.all(dim=-2).any())


def _proven(folder: ModelFolder) -> ProvenModel:
    weights = LazyCheckpoint(folder)
    blocks = find_blocks(weights.model)
    weights.acquire_rest([block.name for block in blocks])
    found = FoundModel(weights, blocks, choose_matrices(weights.model, blocks))
    words = int(weights.model.config.get_text_config().vocab_size)
    return prove_replay(found, torch.randint(words, (1, 32), generator=torch.Generator().manual_seed(0)))


def _width(part: Part, silent: Sequence[Tensor]) -> int:
    """Return the number of units that a part keeps: the most used by any consumer, rounded up to whole steps."""
    heard = max(int((~own).sum()) for own in silent)
    step = 1 if part.kind == "heads" else step_of(part.count, _ALIGN)
    return max(1, -(-heard // step)) * step


def _edits(model: ProvenModel, silence: Silence, common: Mapping[_Size, int] | None) -> dict[str, list[Edit]]:
    """Return the edits that narrow each block to a common width, or to its own where `common` is None."""
    edits: dict[str, list[Edit]] = {}
    for block, found in silence.items():
        masks: dict[str, Tensor] = {}
        for part, silent in found:
            count = _width(part, silent) if common is None else common[part.kind, part.count]
            if count < part.count:
                masks = together(masks, part.masks([filled(~own, count) for own in silent]))
        kept = slices_kept(model.module, block, masks, partial(model.weights.layout, block)) if masks else {}
        if kept:
            edits[block] = [KeepSlices(kept=kept)]
    return edits


def _configured(edits: dict[str, list[Edit]], told: Mapping[str, Any], widths: Mapping[_Size, Sequence[int]]) -> Edits:
    """Add the configuration changes and the record of removed units to the edits."""
    fewer = tuple(Fewer.of(kind, count, own) for (kind, count), own in widths.items() if min(own) < count)
    edits[[*edits][-1]].append(Configure(changes=dict(told), removed=SilentUnits(parts=fewer)))
    return Edits(edits)


def _changes(source: Exported, model: ProvenModel, silence: Silence, common: Mapping[_Size, int]) -> dict[str, Any]:
    """Return the configuration changes for these common widths; empty if no configuration can express them."""
    cut = source.without(Edits(_edits(model, silence, common)))
    shapes = {name: cut.own_shape(name) for name in source.tensors}
    units = {(part.kind, part.count, part.repeats) for found in silence.values() for part, _ in found}
    sizes = [(count * n, common[kind, count] * n) for kind, count, repeats in sorted(units) for n in (1, repeats)]
    sizes = [*dict.fromkeys((old, new) for old, new in sizes if old != new)]
    head = head_size(model.module)
    heads = any(kind == "heads" and kept < count for (kind, count), kept in common.items())
    resized = Resized(sizes, extra={"head_dim": head} if head is not None and heads else {})
    return next(possible_changes(model.module, shapes, resized), {})
