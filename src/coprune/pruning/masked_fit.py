"""Least squares over kept weights only: a refit for any mask, and the check that it makes no row worse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coprune.base.precision import total
from coprune.base.reading import Questions

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Bound of a float32 dot product's rounding, relative to the root of its length and the sizes of its factors."""


@dataclass(frozen=True)
class Rounds:
    """Limits of conjugate gradients."""

    most: int
    """Maximum number of rounds."""
    tolerance: float = 0.0
    """Stop after the first round that lowers the matrix's error by less than this share of it; 0 runs them all."""
    products: torch.dtype = torch.float32
    """Precision of the products with the Gram matrix, except the first. In bfloat16 each step is slightly off, which later
    rounds correct, so ten rounds reach what ten exact ones do."""


def damp_diagonal(gram: Tensor, damping: float) -> Tensor:
    """Return G + damping · diag(G), I × I: which damps each input in proportion to itself and dead ones not at all."""
    return gram + torch.diag(damping * gram.diagonal())


def solve_masked(weight: Tensor, start: Tensor, keep: Tensor, gram: Tensor, rounds: Rounds) -> Tensor:
    """Minimise (W − Ŵ)G(W − Ŵ)ᵀ over the kept entries of every row, by conjugate gradients on all rows at once.

    The residual is masked in each round and preconditioned by the diagonal of G, which leaves one product per round for
    all rows.

    Args:
        weight: O × I float32, the target.
        start: O × I float32, zero where keep is False.
        keep: O × I bool.
        gram: I × I float32, damped if it may be singular.
        rounds: of conjugate gradients.

    Returns:
        O × I float32.
    """
    kept = keep.to(torch.float32)
    diagonal = gram.diagonal()
    preconditioner = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal))
    solution = start
    delta = weight - start
    residual = delta @ gram
    if rounds.tolerance:
        error = total(delta * residual)
    del delta  # saves one matrix of this size in all rounds
    residual.mul_(kept)
    direction = residual * preconditioner
    strength = (residual * direction).sum(dim=1, keepdim=True)
    factor = gram.to(rounds.products)
    settled: Questions[Tensor] = Questions()
    for _ in range(rounds.most):
        image = (direction.to(factor.dtype) @ factor).to(torch.float32).mul_(kept)
        step = _ratio(strength, (direction * image).sum(dim=1, keepdim=True))
        solution = torch.addcmul(solution, step, direction)
        if rounds.tolerance:
            gain = (step * strength).sum(dtype=torch.float64)
            error = error - gain
            if (done := settled.ask(gain < rounds.tolerance * error, solution)) is not None:
                return done
        residual.addcmul_(step, image, value=-1)
        scaled = residual * preconditioner
        before, strength = strength, (residual * scaled).sum(dim=1, keepdim=True)
        direction = scaled.addcmul_(_ratio(strength, before), direction)
    done = settled.rest()
    return solution if done is None else done


def rows_improved(weight: Tensor, before: Tensor, after: Tensor, gram: Tensor) -> Tensor:
    """Return the rows whose layer error is lower in `after` than in `before`.

    The difference of both errors ΔGΔᵀ is the change times G times the sum of both Δ: one product instead of two, and no
    difference of large numbers. Differences within float32 rounding do not count.

    Args:
        weight: O × I float32, the target.
        before: O × I float32.
        after: O × I float32.
        gram: I × I float32.

    Returns:
        O × 1 bool.
    """
    change, both = after - before, 2 * weight - before - after
    gain = ((change @ gram) * both).sum(dim=1, keepdim=True, dtype=torch.float64)
    scale = gram.diagonal().clamp_min(0).sqrt()
    sizes = [(each * scale).norm(dim=1, keepdim=True) for each in (change, both)]
    improved: Tensor = gain > ROUNDING * gram.shape[0] ** 0.5 * sizes[0] * sizes[1]
    return improved


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, or zero where a row has converged and `below` is zero."""
    return torch.where(below > 0, above / below, torch.zeros_like(above))
