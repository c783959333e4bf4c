"""The plan of a removal, and the cut of one block as masks, edits and counts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coprune.model.blocks import Block
from coprune.model.edit import DropBlock, Edit, KeepExperts, KeepSlices, MergeMap, PadUnits
from coprune.model.kept_slices import runs_of
from coprune.model.removed import Fewer
from coprune.model.saved_slices import Layout, masks_as_saved, saved_name, slices_kept, whole_slices
from coprune.recipe.structure import Left
from coprune.removal.channels_and_heads import Kind, Part, filled, together
from coprune.removal.maps import spans_of
from coprune.removal.mixtures import Mixture
from coprune.run.context import Run


@dataclass(frozen=True)
class Plan:
    """The part of a removal that is decided before the walk."""

    dropped: Sequence[int] = ()
    """Numbers of the removed blocks."""
    mapped: Sequence[int] = ()
    """Numbers of the blocks that absorb the map of the blocks removed right after them."""
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    """Parts that shrink, by block."""
    keep: Mapping[Kind, Mapping[int, int]] = field(default_factory=dict)
    """Number of saved units of a part, by kind and original number."""
    mixtures: Mapping[str, Mixture] = field(default_factory=dict)
    """Mixtures that lose experts, by block."""
    experts: Mapping[int, int] = field(default_factory=dict)
    """Number of kept experts, by original number."""
    uneven: Mapping[str, int] = field(default_factory=dict)
    """Number of kept units by part name where blocks differ; the other saved units are zeros."""
    chosen: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Numbers of the kept units, by part name, where several parts must keep the same."""

    def count(self, part: Part) -> int:
        """Return the number of kept units of a part."""
        return self.uneven.get(part.name, self.saved(part))

    def saved(self, part: Part) -> int:
        """Return the number of a part's units in the saved model, which the configuration fixes to one number per kind."""
        return self.keep[part.kind][part.count]

    def sizes(self) -> list[tuple[int, int]]:
        """Return the old and new numbers in the configuration: of units, query heads and experts."""
        units = [part for parts in self.parts.values() for part in parts]
        found = [(part.count * times, self.saved(part) * times) for part in units for times in (1, part.repeats)]
        return list(dict.fromkeys([*found, *self.experts.items()]))


@dataclass(frozen=True)
class Cut:
    """The kept units and experts of a block."""

    units: Sequence[tuple[Part, Sequence[Tensor]]] = ()
    """Kept units of its parts, U bool for each consumer."""
    experts: Tensor | None = None
    """Kept experts, E bool; None if all stay."""

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """Masks of its parameters: bool, by name."""
        return _masks(self.units)

    def padded(self, plan: Plan) -> Cut:
        """Return the cut with silent units up to the saved number."""
        return Cut([(part, [filled(keep, plan.saved(part)) for keep in keeps]) for part, keeps in self.units])

    def padding(self, plan: Plan) -> int:
        """Return the number of saved parameters that are only padding."""
        real = self.masks
        return sum(int((mask & ~real[name]).sum()) for name, mask in self.padded(plan).masks.items())


def _masks(units: Sequence[tuple[Part, Sequence[Tensor]]]) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for part, keeps in units:
        masks = together(masks, part.masks(keeps))
    return masks


def edits_of_block(run: Run, plan: Plan, block: Block, cut: Cut, layout: Layout | None = None) -> list[Edit]:
    """Return the edits of a block. layout: of the checkpoint, if transformers would save the model differently."""
    model = run.model
    if block.index in plan.dropped:
        return [dropped(run, block.index, layout)]
    edits: list[Edit] = [
        MergeMap(blocks=[model.names[index] for index in span.gone])
        for span in spans_of(plan.dropped, plan.mapped)
        if span.before == block.index
    ]
    if cut.units:
        saved = cut.padded(plan)
        edits.append(KeepSlices(kept=slices_kept(model.module, block.name, saved.masks, layout)))
        edits += _pads(plan, cut, saved)
    if cut.experts is not None:
        edits.append(keep_experts(model.module, block.module, plan.mixtures[block.name], cut.experts, layout))
    return edits


def _pads(plan: Plan, cut: Cut, saved: Cut) -> Iterator[PadUnits]:
    for (part, keeps), (_, whole) in zip(cut.units, saved.units, strict=True):
        if part.name in plan.uneven:
            real = [runs_of(keep[own]) for keep, own in zip(keeps, whole, strict=True)]
            yield PadUnits(part=part.kind, units=plan.saved(part), real=real)


def dropped(run: Run, index: int, layout: Layout | None = None) -> DropBlock:
    """Return the edit that drops a block. layout: as in `edits_of_block`."""
    model = run.model
    block = model.names[index]
    saved = saved_name(model.module, block, layout)
    entries, handed = model.structure.answers[index].entries, model.structure.handed[index]
    passes = {entry: place for entry, place in handed.leaves if place in handed.takes}
    return DropBlock(block=block, entries=entries, saved=None if saved == block else saved, passes=passes)


def anywhere(plan: Plan, block: Block) -> Cut:
    """Cut arbitrary units of a block, for a rehearsal."""
    if block.index in plan.dropped:
        return Cut()
    # Each expert keeps different units, so that a dependence on their positions would show.
    units = [
        (part, [_spread(part.count, plan.count(part)).roll(i) for i in range(len(part.fold.consumers))])
        for part in plan.parts.get(block.name, ())
    ]
    mixture = plan.mixtures.get(block.name)
    if mixture is None:
        return Cut(units)
    # Unevenly, so that unnoticed groups would show.
    generator = torch.Generator().manual_seed(block.index)
    order = (
        torch.rand(mixture.groups, mixture.count // mixture.groups, generator=generator).argsort(dim=1).argsort(dim=1)
    )
    return Cut(units, (order < plan.experts[mixture.count] // mixture.groups).flatten())


def _spread(units: int, count: int) -> Tensor:
    """Choose `count` of the units, evenly spaced."""
    keep = torch.zeros(units, dtype=torch.bool)
    keep[torch.linspace(0, units - 1, count).round().long()] = True
    return keep


def fewer(plan: Plan, blocks: int, share: float | Left | None = None) -> Iterator[Fewer]:
    """Yield what a plan keeps, by kind and size. blocks: number of blocks; share: requested share of experts."""
    for kind, keep in plan.keep.items():
        for old in sorted(keep):
            parts = [part for own in plan.parts.values() for part in own if (part.kind, part.count) == (kind, old)]
            yield Fewer.of(kind, old, [plan.count(part) for part in parts] or [keep[old]])
    for old, new in sorted(plan.experts.items()):
        exact = share is None or isinstance(share, Left) or round(old * (1 - share)) == new
        yield Fewer.of("experts", old, [new], None if exact or isinstance(share, Left) else share)
    if plan.dropped:
        yield Fewer.of("blocks", blocks, [blocks - len(plan.dropped)])


def keep_experts(
    model: PreTrainedModel, block: nn.Module, mixture: Mixture, keep: Tensor, layout: Layout | None = None
) -> KeepExperts:
    """Return the edit that keeps some experts of a mixture.

    Args:
        model: the model.
        block: that the mixture is in.
        mixture: its structure.
        keep: E bool.
        layout: as in `slices_kept`.

    Raises:
        UnsupportedModel: what is kept of a tensor is not whole slices.
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
    """Yield tensor-name prefixes followed by an expert number, if every number exists and exactly `gone` are removed."""
    left_out = {name for name, mask in masks.items() if not bool(mask.any())}
    found = set()
    for name in left_out:
        for digits in re.finditer(r"(?<![^.])\d+(?=\.)", name):
            before, after = name[: digits.start()], name[digits.end() :]
            alike = [f"{before}{number}{after}" for number in range(count)]
            if masks.keys() >= set(alike) and {n for n, other in enumerate(alike) if other in left_out} == gone:
                found.add(before)
    yield from sorted(found)
