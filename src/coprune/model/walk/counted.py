"""Which rows of what a matrix is multiplied with are counted, where a run counts only some of the calibration's tokens.

All tokens run through the model, since they are what the counted ones look back on. Most products have a row for every
token, in order. An expert has rows of the tokens that were routed to it, in an order of its family's own: they are found
again by their values among the rows of a product that had all tokens, such as the router's. What comes after that in the
same expert has the same rows in the same order.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.base.words import Set
from coprune.model.matrices import Matrix


@dataclass(frozen=True)
class _Routed:
    """Which rows of a product are counted."""

    counted: Tensor
    twins: Tensor | None = None
    """2 × P: numbers of rows that are equal, where only some of those are counted and nobody knows which."""

    def fits(self, rows: Tensor) -> bool:
        """Whether the rows of a later product can be of the same tokens: then twins still are, but for rounding."""
        if len(rows) != len(self.counted):
            return False
        if self.twins is None:
            return True
        one, other = rows[self.twins[0]].to(torch.float32), rows[self.twins[1]].to(torch.float32)
        return bool(((one - other).norm(dim=1) <= 0.02 * one.norm(dim=1)).all())


class CountedRows:
    """The counted rows of one batch's products while it runs through one block."""

    def __init__(self, counted: Tensor) -> None:
        """counted: B × S bool, which tokens are."""
        self._shape, self._all = tuple(counted.shape), bool(counted.all())
        self._counted = counted.flatten()
        self._known: list[Tensor] = []  # keys of the rows of what had a row for every token, the newest last
        self._latest: weakref.ref[Tensor] | None = None
        self._routed: dict[int | str, _Routed] = {}  # of every expert's last product

    def hear(self, x: Tensor) -> None:
        """Remember an operand of any product, in which routed tokens may be found again."""
        if self._all or not self._in_order(x) or (self._latest is not None and self._latest() is x):
            return
        self._latest = weakref.ref(x)
        self._known.append(_keys(x.reshape(len(self._counted), -1)))

    def of(self, matrix: Matrix, x: Tensor) -> Tensor:
        """The counted rows of what a matrix is multiplied with: N × I.

        Raises:
            UnsupportedModel: nobody can tell which tokens the rows are of.
        """
        return x if self._all else x.reshape(-1, x.shape[-1])[self._rows(matrix, x)]

    def _rows(self, matrix: Matrix, x: Tensor) -> Tensor:
        if x.ndim > 2 and matrix.expert is None and tuple(x.shape[:2]) == self._shape:
            return self._counted.repeat_interleave(x.shape[2:-1].numel())
        rows = x.reshape(-1, x.shape[-1])
        # An expert's number, since the two products of one may be in modules of their own.
        expert = matrix.name.rpartition(".")[0] if matrix.expert is None else matrix.expert
        found = self._found_again(_keys(rows))
        if found is None and expert in self._routed and self._routed[expert].fits(rows):
            found = self._routed[expert]
        if found is None and self._in_order(x):
            found = _Routed(self._counted)
        if found is None:
            raise UnsupportedModel(
                f"{matrix.name} is multiplied with rows of which nobody can tell which tokens they are",
                fix=("count all tokens with ", Set("calibrate_on", "all")),
            )
        self._routed[expert] = found
        return found.counted

    def _found_again(self, keys: Tensor) -> _Routed | None:
        """Which of some rows are counted, if each is one of the rows of a product that had all tokens."""
        keys, order = keys.sort(stable=True)
        # Equal rows are told apart by their number among them: whichever is taken, the sums are the same.
        number = torch.arange(len(keys), device=keys.device) - torch.searchsorted(keys, keys)
        for known in reversed(self._known):
            rows, places = known.sort(stable=True)
            at = (torch.searchsorted(rows, keys) + number).clamp(max=len(rows) - 1)
            if torch.equal(rows[at], keys):
                counted = self._counted[places[at]]
                equal = keys[1:] == keys[:-1]
                mixed = bool((equal & (counted[1:] != counted[:-1])).any())
                twins = torch.stack([order[1:][equal], order[:-1][equal]]) if mixed else None
                return _Routed(torch.zeros_like(counted).scatter(0, order, counted), twins)
        return None

    def _in_order(self, x: Tensor) -> bool:
        """Whether there is one row for every token."""
        sizes = [size for size in x.shape[:-1] if size != 1]
        return sizes in ([size for size in self._shape if size != 1], [len(self._counted)])


def _keys(rows: Tensor) -> Tensor:
    """A number for every row that only equal rows have in common: T int64. rows: T × I, of any floating dtype."""
    width = rows.shape[1]
    # Bits, of which the widening from a narrower dtype loses none, weighed with odd numbers and added up modulo 2⁶⁴.
    bits = rows.detach().to(torch.float32).contiguous().view(torch.int32).to(torch.int64)
    generator = torch.Generator().manual_seed(width)
    weights = torch.randint(-(2**63), 2**63 - 1, (width,), dtype=torch.int64, generator=generator) | 1
    return (bits * weights.to(rows.device)).sum(dim=1)
