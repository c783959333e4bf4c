"""Damped, checked factorisations shared by the solvers.

float32 unless stated otherwise. A failed factorisation is never replaced by an identity matrix (which would be magnitude
pruning under another name): the damping is raised, then the spectrum is clipped, both recorded as events; then
NumericalError is raised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.pruning.solver_events import Event

ESCALATIONS = 3
"""Number of tenfold increases of the damping before the spectrum is clipped."""
SMALLEST_HALF = 128
"""Size up to which a triangular matrix is inverted directly."""


def unless_all_zero(values: Tensor) -> Tensor:
    """Return the values, or ones if all are zero, so that ranking falls back to the weights.

    values: such as mean squares of inputs.
    """
    return torch.where((values != 0).any(), values, torch.ones_like(values))


def damped_cholesky(matrix: Tensor, damping: float) -> tuple[Tensor, tuple[Event, ...]]:
    """Factor matrix + damping · mean(diag) · I; of a matrix of zeros, damping · I.

    Args:
        matrix: I × I float32, symmetric.
        damping: above 0.

    Returns:
        L (I × I float32, lower, LLᵀ = the damped matrix) and the events.

    Raises:
        NumericalError: the matrix is not finite or cannot be repaired.
    """
    mean = unless_all_zero(matrix.diagonal().mean())
    events: list[Event] = []
    strength = damping
    for _ in range(ESCALATIONS + 1):
        damped = matrix.clone()
        damped.diagonal().add_(strength * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if bool((info == 0) & torch.isfinite(lower).all()):
            return lower, tuple(events)
        if not bool(torch.isfinite(matrix).all()):
            raise NumericalError("the Gram matrix holds NaN or infinite values")
        strength *= 10
        events.append(Event(kind="damping raised", figures={"damping": strength}))
    events[-1] = Event(kind="eigenvalues clipped")
    return _clipped_cholesky(matrix, float(damping * mean)), tuple(events)


def _clipped_cholesky(matrix: Tensor, floor: float) -> Tensor:
    """Return the lower factor of the matrix with eigenvalues clipped from below at `floor` (and 1e-6 of the largest)."""
    values, vectors = torch.linalg.eigh(matrix.double())
    clipped = values.clamp_min(max(floor, 1e-6 * float(values[-1])))
    repaired: Tensor = (vectors * clipped) @ vectors.T
    factor, info = torch.linalg.cholesky_ex(repaired)
    lower: Tensor = factor.to(matrix.dtype)
    if int(info) != 0 or not bool(torch.isfinite(lower).all()):
        raise NumericalError("the Gram matrix cannot be factored, not even with its eigenvalues clipped from below")
    return lower


class InverseFactor(NamedTuple):
    """The inverse of a damped Gram matrix as Uᵀ·U with U = diag(pivots) · unit.

    unit: I × I float32, upper triangular with ones on its diagonal; pivots: I float32; dead: I bool, the inputs that are
    zero for every token.
    """

    unit: Tensor
    pivots: Tensor
    dead: Tensor
    events: tuple[Event, ...]


def factor_inverse(gram: Tensor, damping: float) -> InverseFactor:
    """Factor the inverse of gram + damping · mean(diag) · I, the U of SparseGPT (arXiv 2301.00774).

    The authors factor, invert and factor again. Here one factorisation from the last row to the first gives H = RRᵀ with R
    upper triangular, so U = R⁻¹: half the work, and one step that can fail instead of two. Dead inputs get the mean of the
    live diagonal instead of the authors' 1, which depends on the activations' scale and would change the damping. If all
    inputs are dead, none is treated as dead, since only the weights can rank them.

    Args:
        gram: I × I float32.
        damping: above 0.

    Raises:
        NumericalError: like damped_cholesky.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    dead = dead & ~dead.all()
    live_mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    filler = torch.where(live_mean > 0, live_mean, torch.ones_like(live_mean))
    reverse = gram.flip(0, 1)
    reverse.diagonal().add_(filler * dead.flip(0))
    lower, events = damped_cholesky(reverse, damping)
    del reverse
    upper = lower.flip(0, 1)
    del lower  # matrices of this size dominate the memory of solving
    invert_upper(upper)
    pivots = upper.diagonal().clone()
    return InverseFactor(upper.div_(pivots[:, None]), pivots, dead, events)


def invert_upper(matrix: Tensor) -> None:
    """Invert an upper triangular matrix in place.

    By halves: the inverse of [A B; 0 D] is [A⁻¹ −A⁻¹BD⁻¹; 0 D⁻¹], nearly all of it matrix products. Solving against the
    identity would not exploit that its columns are triangular, too.

    Args:
        matrix: I × I, zero below its diagonal.
    """
    size = matrix.shape[0]
    if size <= SMALLEST_HALF:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = size // 2
    first, corner, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    invert_upper(first)
    invert_upper(last)
    torch.mm(first, corner @ last, out=corner).neg_()


class ScaledGram(NamedTuple):
    """A Gram matrix with its diagonal scaled to one: scaled (I × I float32), scale (I float32, 0 for dead inputs)."""

    scaled: Tensor
    scale: Tensor

    def into(self, weight: Tensor) -> Tensor:
        """Return the weight in the scaled problem, O × I float32: multiplied by the root mean square of each input."""
        return weight.to(torch.float32) * self.scale

    def out_of(self, scaled_weight: Tensor) -> Tensor:
        """Return a weight in its own scale, with zeros for dead inputs."""
        return scaled_weight / torch.where(self.scale > 0, self.scale, torch.ones_like(self.scale))


def scale_gram(gram: Tensor, damping: float) -> ScaledGram:
    """Divide a Gram matrix by the root mean squares of its inputs and add damping to the unit diagonal.

    Args:
        gram: I × I float32.
        damping: added to the unit diagonal.

    Returns:
        The matrix with a diagonal of 1 + damping, or just the damping for dead inputs, whose scale is zero unless all are dead.
    """
    scale = unless_all_zero(gram.diagonal().clamp_min(0)).sqrt()
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = gram / safe / safe[:, None]
    scaled.diagonal().add_(damping)
    return ScaledGram(scaled, scale)
