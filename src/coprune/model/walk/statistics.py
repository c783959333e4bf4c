"""Statistics of a matrix's inputs: sums that are updated batch by batch and can be merged.

Shapes: T tokens of one batch, I inputs of the matrix. Sums are float32 on the inputs' device, regardless of the
model's dtype, and matrices with the same input tensor share one statistic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.errors import NumericalError
from coprune.base.kernels.gram import panels
from coprune.base.kernels.kernel_table import kernel
from coprune.base.precision import full_float32, total
from coprune.base.processes import Processes
from coprune.base.reading import refuse_if

Derived = TypeVar("Derived")


def ratio_of(errors: Tensor) -> float:
    """Return the ratio of two numbers; 0.0 if the second is zero."""
    error, total = errors.tolist()
    return error / total if total > 0 else 0.0


class Sums(ABC):
    """Named float32 sums over tokens, and cached results derived from them."""

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
        """Return name and shape of every float32 sum, for estimates of memory."""

    def merge(self, other: Self) -> None:
        """Add another statistic of the same kind and width."""
        for name, added in other.sums.items():
            self.sums[name] += added
        self.count += other.count
        self._derived.clear()

    def reduce(self, processes: Processes) -> None:
        """Add the other processes' sums for the same tensor, in place; all processes must call this."""
        self.count = processes.add_up(self.sums.values(), self.count)

    def restore(self, sums: Mapping[str, Tensor], count: int) -> None:
        """Restore stored sums and their number of tokens."""
        self.sums = {name: sums[name] for name in self.sums}
        self.count = count
        self._derived.clear()

    @property
    @abstractmethod
    def _look(self) -> Tensor:
        """Values that are not finite if any added input was not."""

    def refuse_infinite(self, place: str | None = None) -> None:
        """Raise NumericalError if added inputs held NaN or infinite values, which stay in the sums.

        In host memory every update checks this; on a device that would synchronise each time, so it is checked once, here.
        place: names the inputs in the message.
        """
        error = NumericalError("the activations hold NaN or infinite values")
        refuse_if(~torch.isfinite(self._look).all(), error if place is None else error.within(place))

    def remember(self, key: Hashable, compute: Callable[[], Derived]) -> Derived:
        """Return the result of `compute`, cached under a key until the statistic is updated.

        So matrices that share a statistic share the factor of its Gram matrix, which is freed with the statistic. Code that
        changes `sums` directly (an all-reduce) must do so before anything is derived from them.
        """
        if key not in self._derived:
            self._derived[key] = compute()
        value: Derived = self._derived[key]
        return value


class Statistic(Sums):
    """Sums over the inputs of a matrix, from which each channel's mean square can be computed."""

    per_channel: ClassVar[str]
    """Name of a sum of shape I to which every input contributes."""
    computes_errors: ClassVar[bool] = False
    """Whether layer errors can be computed from it (`relative_error`); otherwise a sample of the inputs is needed."""

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs.

        x: T × I (any leading dimensions are flattened), any floating dtype.
        Raises NumericalError if an input in host memory is NaN or infinite (see `refuse_infinite` for other devices).
        """
        x_TI = x.reshape(-1, self.width)
        self._derived.clear()
        with full_float32():
            self._add(x_TI)
        self.count += x_TI.shape[0]
        if in_host_memory(x.device):
            self.refuse_infinite()

    @property
    def _look(self) -> Tensor:
        # A NaN or infinity in a channel propagates to its sum, so the T × I values need not be checked.
        return self.sums[self.per_channel]

    @abstractmethod
    def _add(self, x_TI: Tensor) -> None:
        """Add a batch to the sums, in full float32."""

    @abstractmethod
    def _sum_square(self) -> Tensor:
        """Return the sum of squares of each channel over the tokens, I float32."""

    @property
    def mean_square(self) -> Tensor:
        """I float32: mean over the tokens of each channel's square (zeros if no token was seen)."""
        return self._sum_square() / max(self.count, 1)

    @property
    def root_mean_square(self) -> Tensor:
        """I float32: n_j, the norm of every channel divided by the square root of the number of tokens."""
        return self.mean_square.sqrt()

    def topped_up(self, pool: Self) -> Self:
        """Return a statistic with at least as many tokens as inputs, taking the missing ones from a pool's average.

        For an expert with few tokens, whose own Gram matrix would be singular. pool: its layer's statistic.
        """
        mixed = type(self)(self.width, self._sum_square().device)
        missing = max(0, self.width - self.count)
        share = missing / max(pool.count, 1)
        for name, both in mixed.sums.items():
            both += self.sums[name] + share * pool.sums[name]
        mixed.count = self.count + missing
        return mixed

    def squared_errors(self, weight: Tensor, pruned: Tensor) -> Tensor:
        """Return ‖X(W − Ŵ)ᵀ‖² and ‖XWᵀ‖² of all tokens seen (2 float64), if `computes_errors`. weight, pruned: O × I."""
        raise TypeError(f"{type(self).__name__} cannot compute errors")

    def relative_error(self, weight: Tensor, pruned: Tensor) -> float:
        """Return ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² of all tokens seen (0.0 where the dense output is zero), if `computes_errors`.

        weight, pruned: O × I.
        """
        return ratio_of(self.squared_errors(weight, pruned))


class InputNorm(Statistic):
    """Mean square of every input channel (the Wanda statistic, arXiv 2306.11695)."""

    per_channel: ClassVar[str] = "square"

    @classmethod
    def shapes(cls, width: int) -> dict[str, tuple[int, ...]]:
        return {"square": (width,)}

    def _add(self, x_TI: Tensor) -> None:
        self.sums["square"] += x_TI.to(torch.float32).square().sum(dim=0)

    def _sum_square(self) -> Tensor:
        return self.sums["square"]


class InputMoments(InputNorm):
    """Mean and mean square of every input channel (the DSnoT statistic, arXiv 2310.08915)."""

    @classmethod
    def shapes(cls, width: int) -> dict[str, tuple[int, ...]]:
        return {"square": (width,), "sum": (width,)}

    def _add(self, x_TI: Tensor) -> None:
        super()._add(x_TI)
        self.sums["sum"] += x_TI.sum(dim=0, dtype=torch.float32)

    @property
    def mean(self) -> Tensor:
        """I float32: mean over the tokens of each channel."""
        return self.sums["sum"] / max(self.count, 1)


class Gram(Statistic):
    """Gram matrix XᵀX / T of the inputs (the Hessian of SparseGPT up to a factor, arXiv 2301.00774)."""

    per_channel: ClassVar[str] = "sum"  # not the diagonal, whose entries lie far apart in memory
    computes_errors: ClassVar[bool] = True

    @classmethod
    def shapes(cls, width: int) -> dict[str, tuple[int, ...]]:
        return {"gram": (width, width), "sum": (width,)}

    def _add(self, x_TI: Tensor) -> None:
        self.sums["sum"] += x_TI.sum(dim=0, dtype=torch.float32)
        # Only panels on and right of the diagonal: little more than half of the products.
        kernel("add_to_gram", x_TI.device)(self.sums["gram"], x_TI, self._panel_size())

    def _panel_size(self) -> int:
        size: int = kernel("panel_size", self.sums["gram"].device)(self.width)
        return size

    def _panels(self) -> Iterator[slice]:
        return panels(self.width, self._panel_size())

    def _sum_square(self) -> Tensor:
        return self.sums["gram"].diagonal()

    @property
    def mean(self) -> Tensor:
        """I float32: mean over the tokens of each channel."""
        return self.sums["sum"] / max(self.count, 1)

    @property
    def gram(self) -> Tensor:
        """I × I float32, a fresh copy: XᵀX / T. Raises NumericalError if finite inputs were too large for it."""
        gram = self.sums["gram"] / max(self.count, 1)
        too_large = NumericalError("the activations are so large that their Gram matrix is not finite")
        refuse_if(~torch.isfinite(gram.diagonal()).all(), too_large)
        for panel in self._panels():
            gram[panel.stop :, panel] = gram[panel, panel.stop :].T
        return gram

    def squared_errors(self, weight: Tensor, pruned: Tensor) -> Tensor:
        """Return ‖X(W − Ŵ)ᵀ‖² and ‖XWᵀ‖² of all tokens seen (2 float64). weight, pruned: O × I."""
        dense = weight.to(torch.float32)
        with full_float32():
            return torch.stack([self._squared_outputs(dense - pruned), self._squared_outputs(dense)])

    def _squared_outputs(self, rows: Tensor) -> Tensor:
        """Return ‖X rowsᵀ‖² (rows: O × I float32) from the stored half of the Gram matrix."""
        found = torch.zeros((), dtype=torch.float64, device=rows.device)
        for panel in self._panels():
            products = (rows[:, panel] @ self.sums["gram"][panel, panel.start :]).mul_(rows[:, panel.start :])
            own = panel.stop - panel.start
            found += total(products[:, :own]) + 2 * total(products[:, own:])
        return found
