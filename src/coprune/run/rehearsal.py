"""What a removal will do, tried on the model beforehand: the configuration is found, and what cannot work is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.model.blocks import Block
from coprune.model.edit import Configure, DropBlock, Edit, KeepSlices
from coprune.model.edits import Edits
from coprune.model.expert_edit import keep_experts
from coprune.model.experts import Mixture
from coprune.model.folding import close, head_size
from coprune.model.parts import Kind, Part, put_back, silence, together
from coprune.model.smaller import Resized, build_smaller, possible_changes, slices_kept, smaller_tensors
from coprune.model.walk.record import forward_logits, replaced_forwards
from coprune.run.session import Session

_ROUNDING = 1e-3


@dataclass(frozen=True)
class Plan:
    """What a run removes, as far as that is known before the walk."""

    dropped: Sequence[int] = ()
    """Numbers of the blocks that go."""
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    """What may get smaller, by block."""
    keep: Mapping[Kind, Mapping[int, int]] = field(default_factory=dict)
    """How many units of a part are kept, by kind and by how many there are."""
    mixtures: Mapping[str, Mixture] = field(default_factory=dict)
    """Whose experts get fewer, by block."""
    experts: Mapping[int, int] = field(default_factory=dict)
    """How many are kept, by how many there are."""

    def count(self, part: Part) -> int:
        """Units of a part that are kept."""
        return self.keep[part.kind][part.count]

    def sizes(self) -> list[tuple[int, int]]:
        """Old numbers and new ones that the configuration has to tell: units, query heads, experts."""
        units = [part for parts in self.parts.values() for part in parts]
        found = [(part.count * times, self.count(part) * times) for part in units for times in (1, part.repeats)]
        return list(dict.fromkeys([*found, *self.experts.items()]))


def edits_of_block(
    session: Session, plan: Plan, block: Block, masks: Mapping[str, Tensor], experts: Tensor | None = None
) -> list[Edit]:
    """What is done to a block. masks: what is kept of its parameters; experts: which are kept, E bool, if any go."""
    model = session.model
    if block.index in plan.dropped:
        return [_drop(session, block.index)]
    edits: list[Edit] = [KeepSlices(kept=slices_kept(model.module, block.name, masks))] if masks else []
    if experts is not None:
        edits.append(keep_experts(model.module, block.module, plan.mixtures[block.name], experts))
    return edits


def _drop(session: Session, index: int) -> DropBlock:
    model = session.model
    return DropBlock(block=model.names[index], entries=model.structure.answers[index].entries)


def rehearse(session: Session, plan: Plan, quiet: bool = False) -> Configure:
    """Cut the model at arbitrary places, build what results, and compare the two; then put everything back.

    So the configuration is found, and everything that could not work is refused before anything slow. quiet: nobody is told.
    Raises UnsupportedModel.
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
            experts = None
            if (mixture := plan.mixtures.get(block.name)) is not None:
                experts = _spread_experts(mixture, plan.experts[mixture.count])
                ended.enter_context(mixture.silent(block.module, experts))
            edits[block.name] = edits_of_block(session, plan, block, masks, experts)
        tensors = smaller_tensors(module, Edits(edits))
        changes, after = _proven_changes(session, tensors, plan)
    before = module.num_parameters()
    removed = (
        f"{', '.join(words_of(plan, len(model.blocks)))}: {before:,} → {after:,} parameters ({after / before - 1:+.1%})"
    )
    if not quiet:
        session.opened.around.reporter.say(f"Removing {removed}.")
    return Configure(changes=changes, removed=removed)


def _proven_changes(session: Session, tensors: Mapping[str, Tensor], plan: Plan) -> tuple[dict[str, Any], int]:
    """The change of the configuration with which a model of these tensors computes what the silenced model does; its size."""
    model, module = session.model, session.model.module
    head = head_size(module)
    unsaid = {"head_dim": head} if head is not None and "heads" in plan.keep else {}
    resized = Resized(plan.sizes(), len(model.blocks), plan.dropped, unsaid)
    expected, fitting, said = forward_logits(module, model.structure.sample), 0, ""
    for changes in possible_changes(module, {name: tensor.shape for name, tensor in tensors.items()}, resized):
        fitting += 1
        small = build_smaller(module, tensors, changes)
        try:
            same = _alike(forward_logits(small, model.structure.sample), expected)
        except Exception as error:  # whatever a model's code says to a configuration that fits its shapes alone
            said = f" (its code says: {str(error).partition(chr(10))[0]})"
            continue
        if same:
            return changes, small.num_parameters()
    if fitting:
        raise UnsupportedModel(
            "a smaller model with the same weights computes something else than the model with these parts silenced, so they "
            f"cannot be removed{said}"
        )
    raise UnsupportedModel(
        f"no change of the configuration of {type(module).__name__} gives the smaller shapes, so what would result could not be "
        "loaded"
    )


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether logits are the same but for rounding, which many blocks without half of their parts make a hundred times as large
    as one block does; a configuration that fits the shapes alone is off by a hundredth at least."""
    a, b = found.float(), expected.float()
    return close(found, expected) or bool((a - b).norm() <= _ROUNDING * b.norm())


def _spread(part: Part, count: int, shift: int) -> Tensor:
    """Units all over a part, other ones for every expert, so that what belongs together by its place alone would show."""
    keep = torch.zeros(part.count, dtype=torch.bool)
    keep[torch.linspace(0, part.count - 1, count).round().long()] = True
    return keep.roll(shift)


def _spread_experts(mixture: Mixture, count: int) -> Tensor:
    """Experts all over each group."""
    own = torch.zeros(mixture.count // mixture.groups, dtype=torch.bool)
    own[torch.linspace(0, len(own) - 1, count // mixture.groups).round().long()] = True
    return own.roll(1).repeat(mixture.groups)


def words_of(plan: Plan, blocks: int) -> Iterator[str]:
    """What a plan removes, for people. blocks: how many there are."""
    for kind, keep in plan.keep.items():
        counts = " and ".join(f"{old} → {new}" for old, new in sorted(keep.items()))
        yield f"{'key-value heads with their query heads' if kind == 'heads' else kind} {counts} of every block"
    for old, new in sorted(plan.experts.items()):
        yield f"experts {old} → {new} of every mixture"
    if plan.dropped:
        yield f"blocks {blocks} → {blocks - len(plan.dropped)}"
