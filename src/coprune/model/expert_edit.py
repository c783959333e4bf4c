"""The edit that removing experts makes: what is cut away of a block's tensors, and which of them go as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from coprune.model.as_saved import Layout, masks_as_saved, whole_slices
from coprune.model.edit import KeepExperts
from coprune.model.removal.experts import Mixture


def keep_experts(
    model: PreTrainedModel, block: nn.Module, mixture: Mixture, keep: Tensor, layout: Layout | None = None
) -> KeepExperts:
    """Tell which experts of a mixture are left.

    Args:
        model: the model.
        block: that the mixture is in.
        mixture: as it was found.
        keep: E bool.
        layout: as in `slices_kept`.

    Raises:
        UnsupportedModel: what would be left of a tensor is no whole slices of it.
    """
    masks = masks_as_saved(model, mixture.block, mixture.masks(block, keep), layout)
    gone = {number for number, kept in enumerate(keep.tolist()) if not kept}
    tables = [path for path, dim in mixture.sliced.items() if dim == 0 and path.startswith(f"{mixture.experts}.")]
    return KeepExperts(
        kept=whole_slices(masks),
        router=mixture.router,
        added=list(mixture.added),
        count=mixture.count,
        experts=keep.nonzero().flatten().tolist(),
        numbered=[*_numbered(masks, gone, mixture.count), *(f"{mixture.block}.{path}[" for path in tables)],
    )


def _numbered(masks: Mapping[str, Tensor], gone: set[int], count: int) -> Iterator[str]:
    """Beginnings of tensors' names in which an expert's number follows: all numbers are there, and those gone have no mask."""
    left_out = {name for name, mask in masks.items() if not bool(mask.any())}
    found = set()
    for name in left_out:
        for digits in re.finditer(r"(?<![^.])\d+(?=\.)", name):
            before, after = name[: digits.start()], name[digits.end() :]
            alike = [f"{before}{number}{after}" for number in range(count)]
            if masks.keys() >= set(alike) and {n for n, other in enumerate(alike) if other in left_out} == gone:
                found.add(before)
    yield from sorted(found)
