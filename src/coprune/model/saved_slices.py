"""Translate masks of a block's parameters to whole slices of its checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import UnsupportedModel
from coprune.model.checkpoint.deferred import filled, values_of
from coprune.model.checkpoint.names import is_below
from coprune.model.edits import Edits
from coprune.model.kept_slices import KeptSlices, runs_of
from coprune.model.transformers_private import (
    conversions_to_revert,
    revert_conversion,
    saved_tensors,
    set_conversions_to_revert,
)

Layout = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Converts a block's values to the names and shapes of a checkpoint."""


def slices_kept(
    model: PreTrainedModel, prefix: str, masks: Mapping[str, Tensor], layout: Layout | None = None
) -> dict[str, KeptSlices]:
    """Translate masks of a block's parameters into slices of its checkpoint's tensors, omitting uncut tensors.

    Args:
        model: the model, whose weights are not read.
        prefix: the block's path.
        masks: bool, by parameter; parameters without a mask are kept.
        layout: of the checkpoint; by default transformers'.

    Raises:
        UnsupportedModel: the kept part of a tensor is not a set of whole slices.
    """
    return whole_slices(masks_as_saved(model, prefix, masks, layout))


def masks_as_saved(
    model: PreTrainedModel, prefix: str, masks: Mapping[str, Tensor], layout: Layout | None = None
) -> dict[str, Tensor]:
    """Translate masks of a block's parameters into masks of its checkpoint's tensors, nonzero where entries are kept.

    Masks are converted like the parameters on saving, so no layout has to be known.
    """
    below = {name: tensor for name, tensor in saved_tensors(model).items() if is_below(name, prefix)}
    # An expanded tensor takes no memory along its repeated dimensions.
    state = {name: _floats(masks.get(name, torch.ones(()).expand(t.shape))) for name, t in below.items()}
    found = revert_conversion(model, state) if layout is None else layout(state)
    return {name: _expanded(mask) for name, mask in found.items()}


def saved_name(model: PreTrainedModel, block: str, layout: Layout | None = None) -> str:
    """Return a block's name in the checkpoint: the common prefix of its tensors. layout: as in `slices_kept`."""
    paths = [name.split(".") for name in masks_as_saved(model, block, {}, layout)]
    number = block.rpartition(".")[2]
    for length, part in enumerate(paths[0] if paths else (), start=1):
        if part == number and all(path[:length] == paths[0][:length] for path in paths):
            return ".".join(paths[0][:length])
    return block


def _floats(mask: Tensor) -> Tensor:
    values = _once(mask).float().cpu()
    if mask.ndim == 3 and values.numel() == len(values):  # else transformers would expand it to a full tensor
        return filled(values.expand(len(mask), 1, 1), mask.shape)
    return values.expand(mask.shape)


def _expanded(mask: Tensor) -> Tensor:
    """Return a mask with one value per matrix as a tensor that takes only those values' memory."""
    values = values_of(mask)
    return mask if values is None else torch.tensor(values).view(-1, *[1] * (mask.ndim - 1)).expand(mask.shape)


def _once(mask: Tensor) -> Tensor:
    """Reduce a mask to size one along dimensions in which it repeats."""
    return mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]


def whole_slices(masks: Mapping[str, Tensor]) -> dict[str, KeptSlices]:
    """Return the slices of partly kept tensors. Raises as `slices_kept`."""
    found = {}
    for name, mask in sorted(masks.items()):
        keep = _once(mask) != 0
        if bool(keep.any()) and not bool(keep.all()):
            found[name] = _as_slices(name, keep)
    return found


def _as_slices(name: str, keep: Tensor) -> KeptSlices:
    for dim in range(keep.ndim):
        if (along := _along(keep, dim)) is not None:
            return KeptSlices(dim=dim, size=len(along), ranges=[runs_of(along)])
    for dim in range(1, keep.ndim):
        rows = [_along(part, dim - 1) for part in keep]
        if all(row is not None for row in rows) and len({int(row.sum()) for row in rows if row is not None}) == 1:
            return KeptSlices(dim=dim, size=keep.shape[dim], ranges=[runs_of(row) for row in rows if row is not None])
    raise UnsupportedModel(f"the part of {name} that would be removed is not made of whole slices")


def _along(keep: Tensor, dim: int) -> Tensor | None:
    """Return the kept slices along a dimension; None if the mask does not consist of whole slices."""
    others = [other for other in range(keep.ndim) if other != dim]
    along = keep.any(dim=others) if others else keep
    shape = [-1 if d == dim else 1 for d in range(keep.ndim)]
    return along.cpu() if torch.equal(along.view(shape).expand_as(keep), keep) else None


def smaller_tensors(
    model: PreTrainedModel, edits: Edits, layout: Layout | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """Return the tensors of the smaller model's checkpoint, by name. layout: as in `slices_kept`; prefix: of one block."""
    state = {name: tensor for name, tensor in saved_tensors(model).items() if not prefix or is_below(name, prefix)}
    found = {}
    for name, tensor in (revert_conversion(model, state) if layout is None else layout(state)).items():
        placed = edits.place(name)
        if placed is not None:
            found[placed] = edits.cut(name, tensor)
    return found


def usual_layout(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors to transformers' current layout, whatever checkpoint the model was read from."""
    before = conversions_to_revert(model)
    set_conversions_to_revert(model, None)
    try:
        return revert_conversion(model, state)
    finally:
        set_conversions_to_revert(model, before)
