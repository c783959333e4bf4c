"""What a removal will do, tried on the model beforehand: the configuration is found, and what cannot work is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coprune.base.errors import CopruneError, UnsupportedModel
from coprune.model.as_saved import Layout, saved_name, slices_kept, smaller_tensors, usual_layout
from coprune.model.blocks import Block
from coprune.model.checkpoint.load import prepare
from coprune.model.edit import Configure, DropBlock, Edit, KeepSlices
from coprune.model.edits import Edits
from coprune.model.expert_edit import keep_experts
from coprune.model.folding import close, head_size
from coprune.model.removal.experts import Mixture
from coprune.model.removal.parts import Kind, Part, put_back, silence, together
from coprune.model.removal.smaller import Resized, build_smaller, possible_changes, smaller_skeleton
from coprune.model.walk.record import forward_logits, replaced_forwards
from coprune.run.removal.streamed import same_block_by_block
from coprune.run.session import Session

_ROUNDING, _ROUNDING_OF_HALVES = 1e-3, 6e-2  # thirty blocks in bfloat16 make 2e-2


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


@dataclass(frozen=True)
class Cut:
    """What is kept of a block."""

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """Of its parameters, bool, by name."""
    experts: Tensor | None = None
    """E bool, if any go."""


def edits_of_block(session: Session, plan: Plan, block: Block, cut: Cut, layout: Layout | None = None) -> list[Edit]:
    """What is done to a block. layout: of the checkpoint, if that is not as transformers would save the model."""
    model = session.model
    if block.index in plan.dropped:
        return [_drop(session, block.index)]
    edits: list[Edit] = []
    if cut.masks:
        edits.append(KeepSlices(kept=slices_kept(model.module, block.name, cut.masks, layout)))
    if cut.experts is not None:
        edits.append(keep_experts(model.module, block.module, plan.mixtures[block.name], cut.experts, layout))
    return edits


def _drop(session: Session, index: int) -> DropBlock:
    model = session.model
    block, saved = model.names[index], saved_name(model.module, model.names[index])
    entries = model.structure.answers[index].entries
    return DropBlock(block=block, entries=entries, saved=None if saved == block else saved)


def rehearse(session: Session, plan: Plan, quiet: bool = False) -> Configure:
    """Cut the model at arbitrary places, build what results, and compare the two; then everything is as it was.

    So the configuration is found, and everything that could not work is refused before anything slow. quiet: nobody is told.
    Raises UnsupportedModel.
    """
    model, module = session.model, session.model.module
    cuts = {block.name: _anywhere(plan, block) for block in model.blocks}
    layout = partial(usual_layout, module) if model.weights.streams else None
    edits = Edits({b.name: edits_of_block(session, plan, b, cuts[b.name], layout) for b in model.blocks})
    cut = Rehearsed(session, plan, cuts, edits)
    shapes = {name: tuple(tensor.shape) for name, tensor in smaller_tensors(module, edits, layout).items()}
    proof: Proof = cut.as_a_whole if layout is None else cut.block_by_block
    changes, after = _proven_changes(session, plan, shapes, proof)
    before = module.num_parameters()
    removed = (
        f"{', '.join(words_of(plan, len(model.blocks)))}: {before:,} → {after:,} parameters ({after / before - 1:+.1%})"
    )
    if not quiet:
        session.opened.around.reporter.say(f"Removing {removed}.")
    return Configure(changes=changes, removed=removed, parameters=after)


def _anywhere(plan: Plan, block: Block) -> Cut:
    """Arbitrary places of a block to cut at."""
    if block.index in plan.dropped:
        return Cut()
    masks: dict[str, Tensor] = {}
    for part in plan.parts.get(block.name, ()):
        # Other ones for every expert, so that what belongs together by its place alone would show.
        kept = [_spread(part.count, plan.count(part)).roll(i) for i in range(len(part.fold.consumers))]
        masks = together(masks, part.masks(kept))
    mixture = plan.mixtures.get(block.name)
    if mixture is None:
        return Cut(masks)
    groups = mixture.groups
    own = _spread(mixture.count // groups, plan.experts[mixture.count] // groups)
    return Cut(masks, own.roll(1).repeat(groups))


Proof = Callable[[Mapping[str, Any]], int | None]
"""Whether a change of the configuration makes the model that is wanted: its number of parameters, None if it does not."""


@dataclass(frozen=True)
class Rehearsed:
    """A model that is cut at arbitrary places, and what it is compared with."""

    session: Session
    plan: Plan
    cuts: Mapping[str, Cut]
    """By block."""
    edits: Edits

    @contextmanager
    def _silent(self, block: Block) -> Iterator[None]:
        """For a while, let a block do without what is cut."""
        cut = self.cuts[block.name]
        with ExitStack() as ended:
            ended.enter_context(put_back(block.module, block.name, cut.masks))
            silence(block.module, block.name, cut.masks)
            if cut.experts is not None:
                ended.enter_context(self.plan.mixtures[block.name].silent(block.module, cut.experts))
            yield

    def as_a_whole(self, changes: Mapping[str, Any]) -> int | None:
        """Compare the logits of the silenced model and of the small one."""
        model, module = self.session.model, self.session.model.module
        idle = [block for block in model.blocks if block.index in self.plan.dropped]
        with ExitStack() as ended:
            ended.enter_context(replaced_forwards(idle, lambda block: _drop(self.session, block.index).idle))
            for block in model.blocks:
                ended.enter_context(self._silent(block))
            small = build_smaller(module, smaller_tensors(module, self.edits), changes)
            expected = forward_logits(module, model.structure.sample)
        same = alike(forward_logits(small, model.structure.sample), expected)
        return small.num_parameters() if same else None

    def block_by_block(self, changes: Mapping[str, Any]) -> int | None:
        """The same without the whole model in memory."""
        model, module = self.session.model, self.session.model.module
        small = prepare(smaller_skeleton(module, changes))
        small.tie_weights()  # for the number of its parameters
        return small.num_parameters() if same_block_by_block(model, small, self.edits, self._silent) else None


def _proven_changes(
    session: Session, plan: Plan, shapes: Mapping[str, tuple[int, ...]], proof: Proof
) -> tuple[dict[str, Any], int]:
    """The change of the configuration with which a model of these shapes computes what the silenced model does; its size."""
    model, module = session.model, session.model.module
    head = head_size(module)
    unsaid = {"head_dim": head} if head is not None and "heads" in plan.keep else {}
    resized = Resized(plan.sizes(), len(model.blocks), plan.dropped, unsaid)
    fitting, said = 0, ""
    for changes in possible_changes(module, shapes, resized):
        fitting += 1
        try:
            after = proof(changes)
        except (CopruneError, MemoryError):
            raise
        except Exception as error:  # whatever a model's code says to a configuration that fits its shapes alone
            said = f" (its code says: {str(error).partition(chr(10))[0]})"
            continue
        if after is not None:
            return changes, after
    if fitting:
        raise UnsupportedModel(
            "a smaller model with the same weights computes something else than the model with these parts silenced, so they "
            f"cannot be removed{said}"
        )
    raise UnsupportedModel(
        f"no change of the configuration of {type(module).__name__} gives the smaller shapes, so what would result could not be "
        "loaded"
    )


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether logits are the same but for rounding, which many blocks without half of their parts make a hundred times as large
    as one block does; a configuration that fits the shapes alone is off by a hundredth at least."""
    a, b = found.float(), expected.float()
    rounding = _ROUNDING_OF_HALVES if expected.dtype.itemsize < 4 else _ROUNDING
    return close(found, expected) or bool((a - b).norm() <= rounding * b.norm())


def _spread(units: int, count: int) -> Tensor:
    """So many units, all over those that there are."""
    keep = torch.zeros(units, dtype=torch.bool)
    keep[torch.linspace(0, units - 1, count).round().long()] = True
    return keep


def words_of(plan: Plan, blocks: int) -> Iterator[str]:
    """What a plan removes, for people. blocks: how many there are."""
    for kind, keep in plan.keep.items():
        counts = " and ".join(f"{old} → {new}" for old, new in sorted(keep.items()))
        yield f"{'key-value heads with their query heads' if kind == 'heads' else kind} {counts} of every block"
    for old, new in sorted(plan.experts.items()):
        yield f"experts {old} → {new} of every mixture"
    if plan.dropped:
        yield f"blocks {blocks} → {blocks - len(plan.dropped)}"
