"""What a removal will do, tried on the model beforehand: the configuration is found, and what cannot work is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.model.edit import Configure, DropBlock, Edit, KeepSlices
from coprune.model.edits import Edits
from coprune.model.folding import close, head_size
from coprune.model.parts import Kind, Part, put_back, silence, together
from coprune.model.smaller import Resized, build_smaller, possible_changes, slices_kept, smaller_tensors
from coprune.model.walk.record import forward_logits, replaced_forwards
from coprune.run.session import Session


@dataclass(frozen=True)
class Plan:
    """What a run removes, as far as that is known before the walk."""

    dropped: Sequence[int] = ()
    """Numbers of the blocks that go."""
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    """What may get smaller, by block."""
    keep: Mapping[Kind, Mapping[int, int]] = field(default_factory=dict)
    """How many units of a part are kept, by kind and by how many there are."""

    def count(self, part: Part) -> int:
        """Units of a part that are kept."""
        return self.keep[part.kind][part.count]

    def sizes(self) -> dict[int, int]:
        """New numbers by old ones that the configuration has to tell: units, and query heads. Raises UnsupportedModel."""
        found: dict[int, int] = {}
        for part in (part for parts in self.parts.values() for part in parts):
            for times in (1, part.repeats):
                old, new = part.count * times, self.count(part) * times
                if found.setdefault(old, new) != new:
                    raise UnsupportedModel(
                        f"{old} would become {new} and {found[old]}, so the cut is not one of the model"
                    )
        return found


def edits_of_block(session: Session, plan: Plan, index: int, masks: Mapping[str, Tensor]) -> list[Edit]:
    """What is done to a block. masks: what is kept of its parameters."""
    model = session.model
    if index in plan.dropped:
        return [_drop(session, index)]
    return [KeepSlices(kept=slices_kept(model.module, model.names[index], masks))] if masks else []


def _drop(session: Session, index: int) -> DropBlock:
    model = session.model
    return DropBlock(block=model.names[index], entries=model.structure.answers[index].entries)


def rehearse(session: Session, plan: Plan) -> Configure:
    """Cut the model at arbitrary places, build what results, and compare the two; then put everything back.

    So the configuration is found, and everything that could not work is refused before anything slow.
    """
    model, module = session.model, session.model.module
    edits: dict[str, list[Edit]] = {}
    idle = [block for block in model.blocks if block.index in plan.dropped]
    with ExitStack() as ended:
        ended.enter_context(replaced_forwards(idle, lambda block: _drop(session, block.index).idle))
        for block in model.blocks:
            masks: dict[str, Tensor] = {}
            for part in plan.parts.get(block.name, ()):
                kept = part.masks([_spread(part, plan.count(part), i) for i in range(len(part.fold.consumers))])
                ended.enter_context(put_back(block.module, block.name, kept))
                silence(block.module, block.name, kept)
                masks = together(masks, kept)
            edits[block.name] = edits_of_block(session, plan, block.index, masks)
        tensors = smaller_tensors(module, Edits(edits))
        changes, after = _proven_changes(session, tensors, plan)
    before = module.num_parameters()
    removed = (
        f"{', '.join(_words(plan, len(model.blocks)))}: {before:,} → {after:,} parameters ({after / before - 1:+.1%})"
    )
    session.opened.around.reporter.say(f"Removing {removed}.")
    return Configure(changes=changes, removed=removed)


def _proven_changes(session: Session, tensors: Mapping[str, Tensor], plan: Plan) -> tuple[dict[str, Any], int]:
    """The change of the configuration with which a model of these tensors computes what the silenced model does; its size."""
    model, module = session.model, session.model.module
    head = head_size(module)
    said = {"head_dim": head} if head is not None and "heads" in plan.keep else {}
    resized = Resized(plan.sizes(), len(model.blocks), plan.dropped, said)
    expected, fitting = forward_logits(module, model.structure.sample), 0
    for changes in possible_changes(module, {name: tensor.shape for name, tensor in tensors.items()}, resized):
        fitting += 1
        small = build_smaller(module, tensors, changes)
        try:
            same = close(forward_logits(small, model.structure.sample), expected)
        except Exception:  # whatever a model's code says to a configuration that fits its shapes alone
            continue
        if same:
            return changes, small.num_parameters()
    if fitting:
        raise UnsupportedModel(
            "a smaller model with the same weights computes something else than the model with these parts silenced, so they "
            "cannot be removed"
        )
    raise UnsupportedModel(
        f"no change of the configuration of {type(module).__name__} gives the smaller shapes, so what would result could not be "
        "loaded"
    )


def _spread(part: Part, count: int, shift: int) -> Tensor:
    """Units all over a part, other ones for every expert, so that what belongs together by its place alone would show."""
    keep = torch.zeros(part.count, dtype=torch.bool)
    keep[torch.linspace(0, part.count - 1, count).round().long()] = True
    return keep.roll(shift)


def _words(plan: Plan, blocks: int) -> Iterator[str]:
    for kind, keep in plan.keep.items():
        counts = " and ".join(f"{old} → {new}" for old, new in sorted(keep.items()))
        yield f"{'key-value heads with their query heads' if kind == 'heads' else kind} {counts} of every block"
    if plan.dropped:
        yield f"blocks {blocks} → {blocks - len(plan.dropped)}"
