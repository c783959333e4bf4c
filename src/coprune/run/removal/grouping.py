"""In which steps units can go, so that what is left of a quantised weight keeps the source's scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from coprune.base.errors import UnsupportedModel
from coprune.model.as_saved import slices_kept
from coprune.model.checkpoint.encoding import Encoding
from coprune.model.removal.parts import Part
from coprune.run.session import Session
from coprune.run.stored_as import encoding_for

_MOST = 512


def in_steps(session: Session, parts: Mapping[str, Sequence[Part]]) -> dict[str, list[Part]]:
    """Return the same parts, whose units go in groups as large as the source's encoding needs.

    Raises:
        UnsupportedModel: its scales are for so much that no smaller group of units can go.
    """
    encoding = encoding_for(session.opened.recipe, session.model.weights)
    if encoding.name != "source":
        return {name: [*own] for name, own in parts.items()}
    groups: dict[tuple[str, int], int] = {}
    for own in parts.values():
        for part in own:
            key = part.kind, part.count
            groups[key] = _group(session, encoding, part, groups.get(key, 1))
    return {name: [replace(part, group=groups[part.kind, part.count]) for part in own] for name, own in parts.items()}


def _group(session: Session, encoding: Encoding, part: Part, least: int) -> int:
    """The smallest group of units that can go by itself. least: to begin with."""
    refused = UnsupportedModel(f"no {part.kind} of {part.block} can be removed")
    powers = (1 << power for power in range(_MOST.bit_length()))
    for group in powers:
        if group < least or part.count % group or 2 * group > part.count:
            continue
        every_other = torch.arange(part.count) // group % 2 == 0
        masks = part.masks([every_other] * len(part.fold.consumers))
        layout = partial(session.model.weights.layout, part.block)
        try:
            for name, kept in slices_kept(session.model.module, part.block, masks, layout).items():
                encoding.require_cut(name, kept)
        except UnsupportedModel as error:
            refused = error
        else:
            return group
    raise refused
