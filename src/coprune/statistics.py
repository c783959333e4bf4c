"""What is remembered of a matrix's inputs: sums that are updated batch by batch and can be merged.

Shapes: T tokens of one batch, I inputs of the matrix. Sums are float32 on the inputs' device, whatever the
model's dtype, and matrices that are fed by the same tensor share one statistic.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from coprune.errors import NumericalError


class InputNorm:
    """Mean square of every input channel (the Wanda statistic, arXiv 2306.11695)."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.count = 0  # tokens seen
        self.sums: dict[str, Tensor] = {}
        for name, shape in self.shapes(width).items():
            self.sums[name] = torch.zeros(shape, dtype=torch.float32, device=device)

    @classmethod
    def shapes(cls, width: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every float32 sum, from which memory can be estimated."""
        return {"square": (width,)}

    def update(self, x: Tensor) -> None:
        """Add a batch of inputs.

        x: T × I (any leading dimensions are flattened), any floating dtype.
        Raises NumericalError if an input is NaN or infinite.
        """
        x_TI = x.reshape(-1, self.width).to(torch.float32)
        self._add(x_TI)
        self.count += x_TI.shape[0]
        # A NaN or inf anywhere in a channel shows in that channel's sum of squares, so T × I values need no look.
        if not bool(torch.isfinite(self._sum_square()).all()):
            raise NumericalError("the activations hold NaN or infinite values")

    def _add(self, x_TI: Tensor) -> None:
        self.sums["square"] += x_TI.square().sum(dim=0)

    def _sum_square(self) -> Tensor:
        return self.sums["square"]

    def merge(self, other: Self) -> None:
        """Add what another statistic of the same kind and width has seen."""
        for name, total in self.sums.items():
            total += other.sums[name]
        self.count += other.count

    @property
    def mean_square(self) -> Tensor:
        """I float32: mean over the tokens of each channel's square (zeros if no token was seen)."""
        return self._sum_square() / max(self.count, 1)

    @property
    def root_mean_square(self) -> Tensor:
        """I float32: n_j, the norm of every channel divided by the square root of the number of tokens."""
        return self.mean_square.sqrt()


class InputMoments(InputNorm):
    """Mean and mean square of every input channel (the DSnoT statistic, arXiv 2310.08915)."""

    @classmethod
    def shapes(cls, width: int) -> dict[str, tuple[int, ...]]:
        return {"square": (width,), "sum": (width,)}

    def _add(self, x_TI: Tensor) -> None:
        super()._add(x_TI)
        self.sums["sum"] += x_TI.sum(dim=0)

    @property
    def mean(self) -> Tensor:
        """I float32: mean over the tokens of each channel."""
        return self.sums["sum"] / max(self.count, 1)


class Gram(InputNorm):
    """Gram matrix XᵀX / T of the inputs (the Hessian of SparseGPT up to a factor, arXiv 2301.00774)."""

    @classmethod
    def shapes(cls, width: int) -> dict[str, tuple[int, ...]]:
        return {"gram": (width, width), "sum": (width,)}

    def _add(self, x_TI: Tensor) -> None:
        self.sums["gram"].addmm_(x_TI.T, x_TI)
        self.sums["sum"] += x_TI.sum(dim=0)

    def _sum_square(self) -> Tensor:
        return self.sums["gram"].diagonal()

    @property
    def mean(self) -> Tensor:
        """I float32: mean over the tokens of each channel."""
        return self.sums["sum"] / max(self.count, 1)

    @property
    def gram(self) -> Tensor:
        """I × I float32, a fresh copy: XᵀX / T."""
        return self.sums["gram"] / max(self.count, 1)


def relative_layer_error(gram: Tensor, weight: Tensor, pruned: Tensor) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖², from the Gram matrix.

    gram: I × I float32; weight, pruned: O × I. Returns 0.0 for a layer whose dense output is zero.
    """
    delta = (weight - pruned).to(torch.float32)
    dense = weight.to(torch.float32)
    error = ((delta @ gram) * delta).sum(dtype=torch.float64)
    total = ((dense @ gram) * dense).sum(dtype=torch.float64)
    return float(error / total) if float(total) > 0 else 0.0
