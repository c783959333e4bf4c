"""Where zeros may be: unstructured, or N kept of every M consecutive inputs.

A mask is boolean and True where a weight is kept. A score is float, out × in, and larger means more important.
Ties go the same way everywhere: of equal scores the one with the lower index is pruned first, as a stable
ascending sort would have it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError

Group = Literal["row", "matrix"]

FEW_GROUPS = 4096
"""Up to so many groups of M, comparing their entries takes less time than telling the machine to."""


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere. Which weights compete with each other (row or matrix) is the method's choice."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """N weights kept in every group of M consecutive inputs of one output row, 0 < N < M."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise BadInput(f"pattern {self.n}:{self.m} keeps {self.n} of {self.m}; N:M needs 0 < N < M, such as 2:4.")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros that the pattern fixes."""
        return 1 - self.n / self.m


Pattern = Unstructured | NM


@dataclass(frozen=True)
class Target:
    """What one matrix is to become: a pattern and a sparsity (the fraction of zeros, 0 ≤ s < 1)."""

    pattern: Pattern
    sparsity: float

    def keep(self, score: Tensor, group: Group = "matrix") -> Tensor:
        """Choose the weights to keep.

        score: O × I float. group: which weights compete when the pattern is unstructured.
        Returns O × I bool with exactly floor(s·I) zeros per row (row), floor(s·O·I) in all (matrix), or N kept
        per group of M (N:M). Raises NumericalError on NaN scores, BadInput where M does not divide I.
        """
        if bool(torch.isnan(score).any()):
            raise NumericalError("the scores hold NaN")
        if isinstance(self.pattern, NM):
            return keep_n_of_m(score, self.pattern)
        if group == "row":
            return keep_largest(score, count_pruned(score.shape[1], self.sparsity))
        return keep_largest(score.reshape(1, -1), count_pruned(score.numel(), self.sparsity)).view_as(score)


def parse_pattern(text: str) -> Pattern:
    """Read `unstructured` or `N:M`. Raises BadInput on anything else."""
    if text == "unstructured":
        return Unstructured()
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise BadInput(f"unknown pattern {text!r}; use 'unstructured' or N:M such as 2:4 (2 kept of every 4).")
    return NM(int(match[1]), int(match[2]))


def count_pruned(size: int, sparsity: float) -> int:
    """floor(sparsity · size), not misled by binary fractions (0.29 · 100 is 28.999… in floating point)."""
    return int(size * sparsity + 1e-6)


def keep_largest(score: Tensor, pruned: int) -> Tensor:
    """Prune the `pruned` smallest entries of every row, the lower index first where scores are equal.

    score: O × I float. Returns O × I bool. A selection, not a sort.
    """
    if pruned <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _smallest(score, pruned)
    keep = score > threshold
    tied = score == threshold
    # Of the entries at the threshold only so many fall as the strictly smaller ones leave to prune.
    quota = pruned - (score < threshold).sum(dim=1, keepdim=True)
    if bool((tied.sum(dim=1, keepdim=True) > quota).any()):
        keep |= tied & (tied.cumsum(dim=1) > quota)
    return keep


def keep_n_of_m(score: Tensor, pattern: NM) -> Tensor:
    """Keep the N largest of every M consecutive entries of a row.

    score: O × I float, M divides I (else BadInput). Returns O × I bool.
    """
    rows, width = score.shape
    if width % pattern.m:
        raise BadInput(f"pattern {pattern} does not divide a width of {width} inputs.")
    grouped = score.reshape(-1, pattern.m)
    if pattern.m > 16:
        rank = grouped.argsort(dim=1, stable=True).argsort(dim=1)
    else:
        rank = _rank_by_comparisons(grouped)
    return (rank >= pattern.m - pattern.n).reshape(rows, width)


def _smallest(score: Tensor, position: int) -> Tensor:
    """The position-th smallest value of every row, O × 1."""
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64):
        # NumPy's selection is vectorised: about forty times as fast as kthvalue on the same core.
        found = np.partition(score.detach().numpy(), position - 1, axis=1)[:, position - 1]
        return torch.from_numpy(found.copy())[:, None]
    return score.kthvalue(position, dim=1, keepdim=True).values


def _rank_by_comparisons(grouped: Tensor) -> Tensor:
    """How many of its group an entry beats (of equals, those before it). grouped: groups × M; returns the same.

    Every pair of positions is compared for all groups at once, on contiguous planes: far cheaper than sorting
    millions of groups of four.
    """
    planes = grouped.T.contiguous()
    if planes.shape[1] <= FEW_GROUPS:
        return _rank_at_once(planes).T
    ranks = torch.zeros(planes.shape, dtype=torch.uint8, device=grouped.device)
    for j in range(1, len(planes)):
        for i in range(j):
            above = (planes[i] <= planes[j]).view(torch.uint8)
            ranks[j] += above
            ranks[i] += 1 - above
    return ranks.T


def _rank_at_once(planes: Tensor) -> Tensor:
    """The same for few groups (M × groups): all pairs of positions in five operations instead of five for each pair."""
    before, after, wins, start = _pairs(len(planes), planes.device)
    return torch.addmm(start, wins, (planes[before] <= planes[after]).to(torch.float32))


@cache
def _pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of positions i < j, and how they decide ranks: wins (M × pairs float32) is 1 for j and −1 for i, to be
    added to start (M × 1: every entry beats those after it) where the entry at i is not larger."""
    before, after = torch.triu_indices(size, size, 1, device=device)
    pair = torch.arange(len(before), device=device)
    wins = torch.zeros(size, len(before), dtype=torch.float32, device=device)
    wins[after, pair] = 1
    wins[before, pair] = -1
    return before, after, wins, torch.arange(size - 1, -1, -1, dtype=torch.float32, device=device)[:, None]
