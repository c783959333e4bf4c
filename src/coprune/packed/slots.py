"""The layers of a model that stay packed: which of a folder's tensors they come from, and slots that wait for them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.model.checkpoint.names import kinds_of
from coprune.model.transformers_private import Renaming, conversions_of, tied_names
from coprune.packed.header import Header
from coprune.packed.linear import PackedSlot

logger = logging.getLogger(__name__)


def keys_in_model(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """The model's name for every tensor of the files, and whether its layout changes on the way.

    Raises BadInput where two tensors would become one parameter: one would be checked and the other computed with.
    """
    known = dict(model.state_dict())
    renaming = Renaming(model, conversions_of(model), known)
    found: dict[str, tuple[str, bool]] = {}
    sources: dict[str, str] = {}
    for key in keys:
        name, changes = found[key] = renaming.of(key)
        if changes or name not in known:
            continue
        if name in sources:
            raise BadInput(f"{sources[name]} and {key} are both {name}", fix="copy or pack the model again")
        sources[name] = key
    return found


def insert_slots(model: PreTrainedModel, headers: dict[str, Header], keys: dict[str, tuple[str, bool]]) -> set[str]:
    """Replace the linear layers whose packed weight arrives whole. Returns the weights' names in the model."""
    tied, parameters = tied_names(model), dict(model.state_dict())
    slots: set[str] = set()
    left: list[str] = []
    for key, header in headers.items():
        name, changes = keys[key]
        if name in tied:
            continue  # the embedding, of which single rows are read
        module = model.get_submodule(name.rpartition(".")[0]) if name in parameters and not changes else None
        if type(module) is not nn.Linear or tuple(module.weight.shape) != header.shape:
            left.append(key)
            continue
        if module.weight.dtype != header.dtype:
            logger.warning(
                "%s is stored as %s and wanted as %s, so it is unpacked", name, header.dtype, module.weight.dtype
            )
            continue
        model.set_submodule(name.removesuffix(".weight"), PackedSlot(header, module))
        slots.add(name)
    if left:
        logger.warning(
            "dense in memory, since only linear layers multiply from packed weights: %s", ", ".join(kinds_of(left))
        )
    return slots
