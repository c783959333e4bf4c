"""Mixtures of experts that the model's class does not load, such as layers for speculative decoding.

A configuration has a single number of experts, so these lose as many as the blocks do. They are recognised by what they share
with a block's mixture: a router of the same name with as many rows, beside as many experts with the same names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from coprune.model.edit import KeepCarried, KeepExperts
from coprune.model.kept_slices import KeptSlices, runs_of

Read = Callable[[str], Tensor]
"""Returns a tensor by its name."""


@dataclass(frozen=True)
class CarriedMixture:
    """A mixture among the tensors that are not loaded, by their names."""

    path: str
    """The common prefix of its names."""
    router: str
    sliced: Mapping[str, int]
    """Tensors with one entry per expert, including the router's, with the dimension of the experts."""
    numbered: tuple[str, ...]
    """Prefixes of names that are followed by an expert's number."""
    count: int

    def matrices(self, names: Sequence[str], read: Read) -> Iterator[tuple[int, Tensor]]:
        """Yield every matrix of the experts, with the expert's number.

        Args:
            names: of all tensors.
            read: reads one; at most one is in memory.
        """
        for name, dim in self.sliced.items():
            if name != self.router and (tensor := read(name)).ndim > 2:
                yield from enumerate(tensor.unbind(dim))
        for name in names:
            for beginning in self.numbered:
                if (found := _expert(name, beginning)) is not None and (tensor := read(name)).ndim > 1:
                    yield found[0], tensor

    def edit(self, keep: Tensor) -> KeepCarried:
        """Return the edit that keeps some of the experts. keep: E bool."""
        ranges = [runs_of(keep)]
        kept = {name: KeptSlices(dim=dim, size=self.count, ranges=ranges) for name, dim in self.sliced.items()}
        experts = keep.nonzero().flatten().tolist()
        return KeepCarried(
            kept=kept, count=self.count, experts=experts, numbered=list(self.numbered), mixture=self.path
        )


def find_carried(shapes: Mapping[str, Sequence[int]], blocks: Mapping[str, KeepExperts]) -> dict[str, CarriedMixture]:
    """Find the mixtures among tensors that are not loaded.

    Args:
        shapes: of these tensors, by name.
        blocks: the cuts of the model's blocks, by the blocks' names.

    Returns:
        The mixtures by their paths.
    """
    found = dict[str, CarriedMixture]()
    for block, edit in blocks.items():
        for mixture in _like(shapes, _Pattern.of(block, edit)):
            found.setdefault(mixture.path, mixture)
    return found


@dataclass(frozen=True)
class _Pattern:
    """Names of the tensors of a block's mixture, relative to the block."""

    sliced: Mapping[str, int]
    """The dimension of the experts, by name."""
    experts: tuple[str, ...]
    """The prefixes of the experts' tensor names."""
    count: int

    @classmethod
    def of(cls, block: str, edit: KeepExperts) -> _Pattern:
        number = block.rpartition(".")[2]
        sliced = {_within(name, number): slices.dim for name, slices in edit.kept.items()}
        numbered = {_within(name, number) for name in edit.numbered if name.endswith(".")}
        tables = {_within(name, number).rpartition(".")[0] + "." for name in edit.numbered if name.endswith("[")}
        experts = numbered or tables
        return cls(sliced, tuple(sorted(experts)), edit.count)


def _within(name: str, number: str) -> str:
    """Return a block tensor's name without the block's prefix."""
    return name.partition(f".{number}.")[2]


def _like(shapes: Mapping[str, Sequence[int]], pattern: _Pattern) -> Iterator[CarriedMixture]:
    routers = {name: dim for name, dim in pattern.sliced.items() if not name.startswith(pattern.experts)}
    for router, dim in routers.items():
        for name, shape in shapes.items():
            before = name.removesuffix(router)
            if before == name or len(shape) != 2 or shape[dim] != pattern.count:
                continue
            vectors = {before + other: at for other, at in routers.items() if _has(shapes, before + other, at, pattern)}
            lists = [before + own for own in pattern.experts if _numbered(shapes, before + own, pattern.count)]
            tables = {
                other: pattern.sliced.get(other.removeprefix(before), 0)
                for own in pattern.experts
                for other in shapes
                if other.startswith(before + own) and before + own not in lists and shapes[other][0] == pattern.count
            }
            if lists or tables:
                yield CarriedMixture(before.rstrip("."), name, {**vectors, **tables}, tuple(lists), pattern.count)


def _has(shapes: Mapping[str, Sequence[int]], name: str, dim: int, pattern: _Pattern) -> bool:
    shape = shapes.get(name, ())
    return len(shape) > dim and shape[dim] == pattern.count


def _numbered(shapes: Mapping[str, Sequence[int]], beginning: str, count: int) -> bool:
    """Return whether names are numbered by expert, with the same tensors for each of `count` experts."""
    kinds = defaultdict[str, set[int]](set)
    for name in shapes:
        if (found := _expert(name, beginning)) is not None:
            kinds[found[1]].add(found[0])
    return bool(kinds) and all(numbers == set(range(count)) for numbers in kinds.values())


def _expert(name: str, beginning: str) -> tuple[int, str] | None:
    """Return the number of an expert in a name, and the rest of it."""
    number, _, rest = name.removeprefix(beginning).partition(".") if name.startswith(beginning) else ("", "", "")
    return (int(number), rest) if number.isdecimal() else None
