"""Find the source of every tensor of a GGUF file in a checkpoint, by values alone.

A converter renames, transposes, stacks experts, reorders the rows of attention, and adds one to some norms. Nothing here
depends on a model's name: transformers loads the file, and its result shows where each tensor went. For an architecture that
transformers does not know, the source's checkpoint is used, as far as the file's types are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coprune.base.errors import UnsupportedModel
from coprune.model.checkpoint.deferred import held

EXACT = 1e-5
"""Maximum relative error: transformers subtracts the 1 that a converter added to a norm, which rounds."""


_VECTORS = 1e-2
"""The same for vectors, which are never quantised below sixteen bits."""


_STRETCH = 1 << 22
"""Number of values compared at a time; all differences together would take as much memory as an embedding table."""


@dataclass(frozen=True)
class Piece:
    """How a tensor of a GGUF file, or one expert's part of it, is made from a tensor of the checkpoint."""

    names: tuple[str, ...]
    """Tensors of the checkpoint with these values; several if they are equal."""
    expert: int | None = None
    """Index in the tensor's first dimension; None for all of it."""
    transposed: bool = False
    order: Tensor | None = None
    """The checkpoint's row for every row, int64; None for the same order."""
    added: float = 0.0

    def arrange(self, tensor: Tensor) -> Tensor:
        """Arrange the checkpoint's tensor, or a mask of it, as in the GGUF file."""
        part = squeezed(tensor if self.expert is None else tensor[self.expert])
        part = part.T if self.transposed else part
        return part if self.order is None else part[self.order]


_Compare = Callable[[Piece, Tensor, Tensor], Piece | None]
"""Compares a tensor of the checkpoint with one of the file; returns how the second is made from the first, or None."""


@dataclass
class Matcher:
    """Finds the sources of a GGUF file's tensors."""

    tensors: Mapping[str, Tensor]
    """Tensors of the checkpoint, float32; lazy ones are read one at a time."""
    tolerance: float = EXACT
    """Maximum relative error between the file's tensors and these."""
    _norms: dict[tuple[str, int | None], float] = field(default_factory=dict)
    _orders: list[Tensor] = field(default_factory=list)
    """Row orders found so far, which other blocks are likely to share."""

    def find(self, wanted: Iterable[tuple[str, Tensor]]) -> dict[str, list[Piece]]:
        """Return the pieces of every tensor of a GGUF file; none for one without a source in the checkpoint.

        wanted: the file's tensors by name, dequantised. Raises UnsupportedModel if the order of equal rows is ambiguous.
        """
        found: dict[str, list[Piece]] = {}
        undecided: dict[str, Tensor] = {}
        for name, tensor in wanted:
            try:
                found[name] = self._pieces(name, tensor)
            except UnsupportedModel:  # another block may show the order
                found[name], undecided[name] = [], tensor
        return found | {name: self._pieces(name, tensor) for name, tensor in undecided.items()}

    def _pieces(self, name: str, tensor: Tensor) -> list[Piece]:
        block = _block_number(name)
        if squeezed(tensor).ndim < 3:
            whole = self._piece(squeezed(tensor), block, None)
            return [] if whole is None else [whole]
        parts = [self._piece(squeezed(part), block, index) for index, part in enumerate(tensor)]
        return [] if None in parts else [part for part in parts if part is not None]

    def _piece(self, wanted: Tensor, block: int | None, expert: int | None) -> Piece | None:
        own, others = list[tuple[Piece, Tensor]](), list[tuple[Piece, Tensor]]()
        for one in self._candidates(wanted, expert):
            (own if _block_number(one[0].names[0]) == block else others).append(one)
        # With a tolerance comparisons are costly and less reliable, so only tensors of the same block are tried.
        groups = (own or others,) if self.tolerance > EXACT else (own, others)
        found_order = self._in_found_order if self.tolerance <= EXACT else self._in_nearest_order
        as_it_is = (self._same, self._with_one_added) if wanted.ndim == 1 else (self._same,)
        ways: Iterable[_Compare] = (*as_it_is, self._in_known_order, found_order)
        for compare, candidates in product(ways, groups):
            # Each is read for its own comparison only: two embedding tables take gigabytes.
            tried = (compare(one, squeezed(held(tensor)), wanted) for one, tensor in candidates)
            matches = [made for made in tried if made is not None]
            if matches:
                names = (piece.names[0] for piece in matches if piece.expert == matches[0].expert)
                return replace(matches[0], names=tuple(names))
        return None

    def _candidates(self, wanted: Tensor, expert: int | None) -> Iterator[tuple[Piece, Tensor]]:
        """Yield tensors with the same number of values and the same norm, which reordering and transposing preserve."""
        norm = float(wanted.norm())
        for name, tensor in self.tensors.items():
            part = expert if expert is not None and tensor.ndim == 3 and expert < len(tensor) else None
            own = tensor if part is None else tensor[part]
            if own.numel() != wanted.numel():
                continue
            key = (name, part)
            if key not in self._norms:
                self._norms[key] = float(own.norm())
            # A converter may add one to a vector, which changes its norm.
            if wanted.ndim < 2 or abs(self._norms[key] - norm) <= max(1e-3, self.tolerance) * norm:
                yield Piece((name,), part), own

    def _in_known_order(self, piece: Piece, tensor: Tensor, wanted: Tensor) -> Piece | None:
        if tensor.shape != wanted.shape:
            return None
        fitting = (order for order in self._orders if len(order) == len(tensor))
        return next((replace(piece, order=order) for order in fitting if self._close(tensor[order], wanted)), None)

    def _in_found_order(self, piece: Piece, tensor: Tensor, wanted: Tensor) -> Piece | None:
        """Match rows by their products with an arbitrary vector."""
        if tensor.shape != wanted.shape:
            return None
        vector = torch.randn(tensor.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mine, theirs = (
            (rows.double() * vector).flatten(1).sum(1) if rows.ndim > 1 else rows for rows in (tensor, wanted)
        )
        (sorted_mine, at_mine), (sorted_theirs, at_theirs) = mine.sort(stable=True), theirs.sort(stable=True)
        if not self._close(sorted_mine, sorted_theirs):
            return None
        order = torch.empty_like(at_mine)
        order[at_theirs] = at_mine
        if not self._close(tensor[order], wanted):
            return None
        if bool((sorted_mine.diff() == 0).any()):
            raise UnsupportedModel(f"{piece.names[0]} has equal rows, whose order in the GGUF file is ambiguous")
        self._orders.append(order)
        return replace(piece, order=order)

    def _in_nearest_order(self, piece: Piece, tensor: Tensor, wanted: Tensor) -> Piece | None:
        """Match each row of a quantised matrix to the nearest one."""
        if tensor.shape != wanted.shape or tensor.ndim < 2:
            return None
        likeness = normalize(wanted, dim=1) @ normalize(tensor, dim=1).T
        order = likeness.argmax(dim=1)
        if not self._close(tensor[order], wanted):
            return None
        if len(order.unique()) < len(order):
            raise UnsupportedModel(
                f"{piece.names[0]} has rows that are too similar to determine their order in the GGUF file"
            )
        self._orders.append(order)
        return replace(piece, order=order)

    def _same(self, piece: Piece, tensor: Tensor, wanted: Tensor) -> Piece | None:
        if tensor.shape == wanted.shape and self._close(tensor, wanted):
            return piece
        if tensor.ndim == 2 and tensor.T.shape == wanted.shape and self._close(tensor.T, wanted):
            return replace(piece, transposed=True)
        return None

    def _with_one_added(self, piece: Piece, tensor: Tensor, wanted: Tensor) -> Piece | None:
        return next((replace(piece, added=one) for one in (1.0, -1.0) if self._close(tensor + one, wanted)), None)

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        tolerance = self.tolerance if expected.ndim > 1 else min(self.tolerance, _VECTORS)
        return distance(found, expected) <= tolerance * float(expected.norm())


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference of two equally shaped tensors, without storing the whole difference."""
    rows = max(1, _STRETCH // max(1, expected[0].numel()))
    parts = zip(found.split(rows), expected.split(rows), strict=True)
    return float(torch.stack([(one - other).norm() for one, other in parts]).norm())


def squeezed(tensor: Tensor) -> Tensor:
    """Return the tensor without dimensions of size one, but with at least one dimension."""
    return tensor.squeeze() if tensor.numel() > 1 else tensor.reshape(-1)


def _block_number(name: str) -> int | None:
    """Return the first number between dots in a name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None
