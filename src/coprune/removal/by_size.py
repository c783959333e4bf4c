"""Mixes of channels, heads and blocks that bring a model to a size, found by counting parameters.

By counting alone channels go first, since they mostly cost least for their size, then heads, then blocks. Mixes with more
blocks and fewer channels are for a run that measures which of them loses least.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from coprune.model.blocks import by_list
from coprune.model.walk.model_structure import ProvenModel
from coprune.recipe.structure import MIXES, Removable
from coprune.removal.block_scores import may_go
from coprune.removal.channels_and_heads import Kind, Part, groups_of, kept_count, step_of

_MOST: dict[Removable, float] = {"channels": 0.75, "heads": 0.5, "blocks": 0.5}
"""Largest share of each kind; beyond it the next kind is removed, too."""
_DIGITS = 8


@dataclass(frozen=True)
class Level:
    """A share of one kind of parts and the number kept at it."""

    share: str = ""
    """Written with the fewest digits; empty if nothing is removed."""
    keep: Mapping[int, int] = field(default_factory=dict)
    """Number of kept units by original number; for blocks, by list."""


@dataclass(frozen=True)
class Mix:
    """A level of each kind of parts, which together leave a target size."""

    levels: Mapping[Removable, Level]
    left: int
    """Upper bound of the parameters left."""

    @property
    def shares(self) -> dict[Removable, str]:
        """The share of each kind that loses any."""
        return {kind: level.share for kind, level in self.levels.items() if level.share}

    @property
    def keep(self) -> dict[Kind, Mapping[int, int]]:
        """Number of kept channels and heads, as in `Plan.keep`."""
        kinds: tuple[Kind, ...] = ("channels", "heads")
        return {kind: self.levels[kind].keep for kind in kinds if self.levels[kind].share}

    def blocks_gone(self, lists: Sequence[int]) -> list[int]:
        """Return the number of blocks to remove from each list. lists: their lengths."""
        keep = self.levels["blocks"].keep
        return [length - keep.get(at, length) for at, length in enumerate(lists)]


@dataclass(frozen=True)
class Counted:
    """Parameter counts of a model."""

    outside: int
    """Parameters outside the blocks."""
    blocks: Sequence[int]
    """Parameters of every block."""
    units: Sequence[Mapping[tuple[Kind, int], int]]
    """Parameters of one unit of each block, summed over its parts, by kind and number of units."""
    lists: Sequence[tuple[Sequence[int], Sequence[int]]]
    """Numbers of each list's blocks, and of those that may go."""

    @classmethod
    def of(cls, model: ProvenModel, parts: Mapping[str, Sequence[Part]]) -> Counted:
        """Count a model's parameters. parts: the removable parts by block."""
        blocks = [sum(one.numel() for one in block.module.parameters()) for block in model.blocks]
        units = []
        for block in model.blocks:
            own: dict[tuple[Kind, int], int] = {}
            for part in parts.get(block.name, ()):
                own[part.kind, part.count] = own.get((part.kind, part.count), 0) + _of_unit(part)
            units.append(own)
        lists = [[block.index for block in own] for own in by_list(model.blocks)]
        outside = model.module.num_parameters() - sum(blocks)
        return cls(outside, blocks, units, list(zip(lists, may_go(model), strict=True)))

    def left(self, levels: Mapping[Removable, Level]) -> int:
        """Return an upper bound of the parameters left: the smallest blocks are assumed to go."""
        sizes = [
            whole - sum(size * (units - levels[kind].keep.get(units, units)) for (kind, units), size in own.items())
            for whole, own in zip(self.blocks, self.units, strict=True)
        ]
        gone = 0
        for at, (own, free) in enumerate(self.lists):
            count = len(own) - levels["blocks"].keep.get(at, len(own))
            gone += sum(sorted(sizes[number] for number in free)[:count])
        return self.outside + sum(sizes) - gone


def _of_unit(part: Part) -> int:
    """Return the number of parameters that go with one unit of a part."""
    keep = torch.arange(part.count) >= part.group
    masks = part.masks([keep] * len(part.fold.consumers))
    return sum(int((~mask).sum()) for mask in masks.values()) // part.group


def mixes_for(counted: Counted, parts: Mapping[str, Sequence[Part]], most: int, align: int) -> Iterator[Mix]:
    """Yield mixes that leave at most `most` parameters, using ever more kinds of parts.

    Args:
        counted: the model.
        parts: the removable parts by block.
        most: maximum number of parameters left.
        align: kept channels are a multiple of this.
    """
    every = _levels(counted, parts, align)
    nothing = Level()
    ways: tuple[tuple[Removable, ...], ...] = ((), ("heads",), ("blocks",), ("heads", "blocks"))
    for used in ways:
        offered = {kind: levels if kind == "channels" or kind in used else [nothing] for kind, levels in every.items()}
        found = _least(counted, offered, most)
        if found is not None and all(found[kind].share for kind in used):
            yield Mix(found, counted.left(found))


def with_more_blocks(
    counted: Counted, parts: Mapping[str, Sequence[Part]], most: int, align: int, first: Mix
) -> list[Mix]:
    """Return a few mixes with ever more blocks and fewer channels than the first; the last has no channels if possible.

    Of neighbouring ones that which leaves the most is taken, since widths come in coarse steps. Arguments as in `mixes_for`.
    """
    every, found, before = _levels(counted, parts, align), list[Mix](), first.keep
    heads = every["heads"] if first.levels["heads"].share else [Level()]
    for level in every["blocks"][1 + every["blocks"].index(first.levels["blocks"]) :]:
        levels = _least(counted, {"channels": every["channels"], "heads": heads, "blocks": [level]}, most)
        assert levels is not None  # fewer blocks were sufficient
        mix = Mix(levels, counted.left(levels))
        if mix.keep != before:  # otherwise more blocks go than have to
            found.append(mix)
        before = mix.keep
        if not before:
            break
    between, last = found[:-1], found[-1:]
    step = max(1, -(-len(between) // (MIXES - 1 - len(last))))
    stretches = (between[at : at + step] for at in range(0, len(between), step))
    return [*(max(own, key=lambda mix: mix.left) for own in stretches), *last]


def _least(counted: Counted, offered: Mapping[Removable, Sequence[Level]], most: int) -> dict[Removable, Level] | None:
    """Return the lowest sufficient levels, with as few blocks and heads as channels allow; None if none suffice."""
    chosen = {kind: levels[-1] for kind, levels in offered.items()}
    if counted.left(chosen) > most:
        return None
    kinds: tuple[Removable, ...] = ("blocks", "heads", "channels")
    for kind in kinds:
        levels = (chosen | {kind: level} for level in offered[kind])
        chosen = next(tried for tried in levels if counted.left(tried) <= most)
    return chosen


def smallest(counted: Counted, parts: Mapping[str, Sequence[Part]], align: int) -> int:
    """Return the smallest parameter count that any of these shares reaches."""
    return counted.left({kind: levels[-1] for kind, levels in _levels(counted, parts, align).items()})


def _levels(counted: Counted, parts: Mapping[str, Sequence[Part]], align: int) -> dict[Removable, list[Level]]:
    return {
        "channels": _unit_levels(parts, "channels", align),
        "heads": _unit_levels(parts, "heads", 1),
        "blocks": _block_levels([(len(own), len(free)) for own, free in counted.lists]),
    }


def _unit_levels(parts: Mapping[str, Sequence[Part]], kind: Kind, align: int) -> list[Level]:
    """Return the shares of channels or heads that differ in the number kept, ascending from none."""
    groups, found = groups_of((part for own in parts.values() for part in own), kind), [Level()]
    steps = {units: step_of(units, align, group) for units, group in groups.items()}
    for share in sorted({1 - kept / units for units, step in steps.items() for kept in range(step, units, step)}):
        keep = {units: kept_count(units, share, align, group) for units, group in groups.items()}
        for text in _written(share) if share <= _MOST[kind] and keep != found[-1].keep else ():
            if all(kept_count(units, float(text), align, groups[units]) == kept for units, kept in keep.items()):
                found.append(Level(text, keep))
                break
    return found


def _block_levels(lists: Sequence[tuple[int, int]]) -> list[Level]:
    """Return the shares of blocks likewise. lists: for each list, the number of blocks and of removable ones."""
    found = [Level()]
    for share in sorted({gone / blocks for blocks, free in lists for gone in range(1, free + 1)}):
        counts = [round(share * blocks) if free else 0 for blocks, free in lists]
        fits = all(count <= free and count < blocks for count, (blocks, free) in zip(counts, lists, strict=True))
        if share > _MOST["blocks"] or not fits:
            break
        text = next(
            text
            for text in _written(share)
            if [round(float(text) * blocks) if free else 0 for blocks, free in lists] == counts
        )
        keep = {at: blocks - count for at, (count, (blocks, _)) in enumerate(zip(counts, lists, strict=True))}
        found.append(Level(text, keep))
    return found


def _written(share: float) -> Iterator[str]:
    """Yield a share with more and more digits."""
    yield from (f"{share:.{digits}f}" for digits in range(1, _DIGITS + 1))
