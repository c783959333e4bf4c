"""The operation `shifted_inverses`: (A + shift · I)⁻¹ of a symmetric matrix for a sequence of shifts.

(A, I × I float32; least, a lower bound of its true eigenvalues without dimensions; the smallest shift, above 0) → a function
from a shift (float64 without dimensions, none smaller) to I × I float32. Rounding of sums may leave A with eigenvalues
slightly below `least`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coprune.base.devices import in_host_memory
from coprune.base.errors import NumericalError

Inverse = Callable[[Tensor], Tensor]


def by_eigenvalues(matrix: Tensor, least: Tensor, smallest: float) -> Inverse:
    """Invert with one float64 decomposition, after which a shift costs one product. Raises NumericalError if A is not finite."""
    if not bool(
        torch.isfinite(matrix).all()
    ):  # checked here, since decomposing such a matrix would raise another error
        raise NumericalError("the Gram matrix holds NaN or infinite values")
    values, vectors = torch.linalg.eigh(matrix.double())
    values, vectors = values.clamp_min(least.double()).float(), vectors.float()

    def inverse(shift: Tensor) -> Tensor:
        found: Tensor = (vectors / (values + shift)) @ vectors.T
        return found

    return inverse


def by_factors(matrix: Tensor, least: Tensor, smallest: float) -> Inverse:
    """Invert with a Cholesky factor for every shift, for devices, where decomposing a wide matrix takes minutes.

    The smallest shift is tried first; if A cannot be factored with it, A is decomposed.
    """

    def inverse(shift: Tensor) -> Tensor:
        lower, _ = torch.linalg.cholesky_ex(_shifted(matrix, shift))
        return inverse_of_factor(lower)

    lower, info = torch.linalg.cholesky_ex(_shifted(matrix, smallest))
    if bool((info == 0) & torch.isfinite(lower).all()):
        return inverse
    return by_eigenvalues(matrix, least, smallest)


def inverse_of_factor(lower: Tensor) -> Tensor:
    """Return (LLᵀ)⁻¹, I × I, of a Cholesky factor L."""
    if in_host_memory(lower.device):
        return torch.cholesky_inverse(lower)
    # Inverting directly would make the host wait for an error check.
    return torch.cholesky_solve(torch.eye(len(lower), dtype=lower.dtype, device=lower.device), lower)


def _shifted(matrix: Tensor, shift: Tensor | float) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return shifted
