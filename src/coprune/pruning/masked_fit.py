"""Least squares over kept weights only: the refit that every mask may have, and what it must not make worse."""

from __future__ import annotations

import torch
from torch import Tensor


def damp_diagonal(gram: Tensor, damping: float) -> Tensor:
    """G + damping · diag(G), I × I: every input damped in proportion to itself, dead ones not at all."""
    return gram + torch.diag(damping * gram.diagonal())


def row_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """Layer error of every row, ΔGΔᵀ.

    In float64, because where there are fewer tokens than inputs the terms cancel to less than float32 can tell.

    Args:
        delta: O × I.
        gram: I × I.

    Returns:
        O float64.
    """
    exact = delta.double()
    return ((exact @ gram.double()) * exact).sum(dim=1)


def solve_masked(weight: Tensor, start: Tensor, keep: Tensor, gram: Tensor, rounds: int) -> Tensor:
    """Minimise (W − Ŵ)G(W − Ŵ)ᵀ over the kept entries of every row, by conjugate gradients on all rows at once.

    The residual is masked in each round and preconditioned by the diagonal of G, which leaves one product per round for
    all rows.

    Args:
        weight: O × I float32, what is aimed at.
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
    solution = start.clone()
    residual = ((weight - solution) @ gram).mul_(kept)
    direction = residual * preconditioner
    strength = (residual * direction).sum(dim=1, keepdim=True)
    for _ in range(rounds):
        image = (direction @ gram).mul_(kept)
        step = _ratio(strength, (direction * image).sum(dim=1, keepdim=True))
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual * preconditioner
        before, strength = strength, (residual * scaled).sum(dim=1, keepdim=True)
        direction = scaled.addcmul_(_ratio(strength, before), direction)
    return solution


def rows_improved(weight: Tensor, before: Tensor, after: Tensor, gram: Tensor) -> Tensor:
    """Tell in which rows the layer error of `after` is no greater than that of `before`.

    Args:
        weight: O × I, what is aimed at.
        before: O × I.
        after: O × I.
        gram: I × I.

    Returns:
        O × 1 bool.
    """
    return (row_errors(weight - after, gram) <= row_errors(weight - before, gram))[:, None]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and zero where a row has converged and nothing is left to divide by."""
    return torch.where(below > 0, above / below, torch.zeros_like(above))
