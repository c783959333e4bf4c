"""Scales of values that are rounded to a grid, and how many bits such a matrix takes."""

from __future__ import annotations

import torch
from torch import Tensor

from coprune.base.kernels.columns import round_to_grid
from coprune.recipe.grid import SCALE_BITS
from coprune.recipe.pattern import Pattern, Target

REACHES = (1.1, 1.0, 0.93, 0.86, 0.79, 0.72, 0.65)
"""How far the grids reach that are tried, as parts of a group's largest value."""


def fit_scales(values: Tensor, cost: Tensor | None, half: int) -> Tensor:
    """Choose the scale of every group, by what its rounding costs: Σ cost · (value − rounded)².

    Several grids are tried that end near the largest value, on the side where they have one code more. For each the scale
    is refitted to the codes that it gives, by least squares; of all these the one that costs least is taken.

    Args:
        values: C × N float32, groups of C values; zero where pruned, which costs nothing on any grid.
        cost: C float32 above 0, of each input; None where all are alike.
        half: codes are from −half to half − 1.

    Returns:
        N float32, bfloat16 numbers (that is how scales are stored), none of them 0.
    """
    weights = torch.ones(1, device=values.device) if cost is None else (cost / cost.mean())[:, None]
    largest = values.gather(0, values.abs().argmax(dim=0, keepdim=True))[0]
    best = torch.ones_like(largest)
    least = torch.full_like(largest, torch.inf)
    for reach in REACHES:
        first = _stored(-reach * largest / half)
        codes = round_to_grid(values, first, half).div_(first)
        weighted = codes * weights
        above, below = (weighted * values).sum(dim=0), (weighted * codes).sum(dim=0)
        scale = _stored(above / below)
        error = (round_to_grid(values, scale, half) - values).square_().mul_(weights).sum(dim=0)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _stored(scale: Tensor) -> Tensor:
    """A scale as it is stored; 1 for groups of nothing but zeros."""
    rounded = scale.to(torch.bfloat16).to(torch.float32)
    return torch.where(torch.isfinite(rounded) & (rounded != 0), rounded, torch.ones_like(rounded))


def without_negative_zeros(weight: Tensor) -> Tensor:
    """The weight with −0.0, which a scale below 0 leaves, as 0."""
    return weight.masked_fill(weight == 0, 0.0)


def stored_bits(weight: Tensor, target: Target) -> int:
    """Count the bits that a rounded matrix takes: its values, where they are, and its scales.

    The cheapest of three forms: every value; a mask of one bit each and the values that are not zero, with a 32-bit start
    for every row; N values of every group of N:M, with their places in it.

    Args:
        weight: O × I, of which only the zeros are looked at.
        target: with its grid.
    """
    assert target.grid is not None
    rows, width = weight.shape
    values = bits_of((rows, width), int(torch.count_nonzero(weight)), target.grid.bits, target.pattern)
    return values + rows * target.grid.steps(width) * SCALE_BITS


def bits_of(shape: tuple[int, int], kept: int, bits: int, pattern: Pattern) -> int:
    """Count the bits of a sparse matrix's values and of where they are, in the cheapest of the three forms.

    Args:
        shape: (out, in).
        kept: how many values are not zero.
        bits: of a value.
        pattern: of the zeros.
    """
    rows, size = shape[0], shape[0] * shape[1]
    forms = [size * bits, size + 32 * rows + kept * bits]
    if pattern.n_of_m is not None:
        n, m = pattern.n_of_m
        forms.append(size // m * n * (bits + (m - 1).bit_length()))
    return min(forms)
