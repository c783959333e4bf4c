"""Sums over tokens, and what is worked out from them once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.base.processes import Processes
from coprune.base.reading import refuse_if

Derived = TypeVar("Derived")


def ratio_of(errors: Tensor) -> float:
    """The first of two numbers as a share of the second, 0.0 where that is zero."""
    error, total = errors.tolist()
    return error / total if total > 0 else 0.0


class Sums(ABC):
    """Named float32 sums over tokens, and what has been worked out from them."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.count = 0  # tokens seen
        self.sums: dict[str, Tensor] = {}
        for name, shape in self.shapes(width).items():
            self.sums[name] = torch.zeros(shape, dtype=torch.float32, device=device)
        self._derived: dict[Hashable, Any] = {}

    @classmethod
    @abstractmethod
    def shapes(cls, width: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every float32 sum, from which memory can be estimated."""

    def merge(self, other: Self) -> None:
        """Add what another statistic of the same kind and width has seen."""
        for name, total in self.sums.items():
            total += other.sums[name]
        self.count += other.count
        self._derived.clear()

    def reduce(self, processes: Processes) -> None:
        """Add what the other processes of a run have seen of the same tensor, in place; all of them call this."""
        self.count = processes.add_up(self.sums.values(), self.count)

    def restore(self, sums: Mapping[str, Tensor], count: int) -> None:
        """Take over sums that were kept, and the number of tokens that they were summed over."""
        self.sums = {name: sums[name] for name in self.sums}
        self.count = count
        self._derived.clear()

    @property
    @abstractmethod
    def _look(self) -> Tensor:
        """Numbers that are not finite if something that was added was not."""

    def refuse_infinite(self, place: str | None = None) -> None:
        """Raise NumericalError if what was added held NaN or infinite values, which stay in the sums.

        In host memory every update does; on a device the host would wait each time, so it is asked once. place: where.
        """
        error = NumericalError("the activations hold NaN or infinite values")
        refuse_if(~torch.isfinite(self._look).all(), error if place is None else error.within(place))

    def remember(self, key: Hashable, compute: Callable[[], Derived]) -> Derived:
        """Return what `compute` gave under this key, computed once until the statistic sees more.

        Matrices that share a statistic so share the factor of its Gram matrix; it is freed with the statistic.
        Whoever changes `sums` from outside (an all-reduce) does so before anything is derived from them.
        """
        if key not in self._derived:
            self._derived[key] = compute()
        value: Derived = self._derived[key]
        return value
