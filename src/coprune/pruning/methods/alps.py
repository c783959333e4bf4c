"""ALPS: an alternation whose penalty grows until the mask stands still, then a solve on that mask (arXiv 2406.07831).

The same splitting as ADMM, but the mask is free in every round and ρ rises as fast as the mask settles. One
eigendecomposition of the Gram matrix makes (Ĝ + ρI)⁻¹ cheap for every ρ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.base.options import require_positive
from coprune.base.precision import full_float32
from coprune.base.reading import refuse_if
from coprune.model.walk.statistics import Gram
from coprune.pruning.linear_algebra import ScaledGram, scale_gram
from coprune.pruning.masked_fit import solve_masked
from coprune.pruning.methods.base import Pruned
from coprune.recipe.pattern import Group, Target

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Factors of ρ: (the least share of kept weights that has to have changed, the factor)."""


class Spectrum(NamedTuple):
    """The scaled problem and its eigenvalues (I) and eigenvectors (I × I, in columns), float32 from float64."""

    problem: ScaledGram
    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class ALPS:
    """Prune by an alternation with rising penalty, and solve for the weights that are left.

    Paper: arXiv 2406.07831.
    """

    rho: float = 0.1
    """The penalty at the start."""
    rounds: int = 300
    """Rounds at most; it stops as soon as the mask stands still."""
    rounds_per_rho: int = 3
    """After how many rounds the mask is looked at and ρ raised."""
    damping: float = 0.01
    """What is added to the Gram matrix's diagonal before it is scaled, as a fraction of its mean."""
    refit_rounds: int = 10
    """Rounds of conjugate gradients on the final mask."""
    group: Group = "matrix"
    """Which weights compete when the pattern is unstructured."""

    statistic: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        require_positive(
            rho=self.rho,
            rounds=self.rounds,
            rounds_per_rho=self.rounds_per_rho,
            damping=self.damping,
            refit_rounds=self.refit_rounds,
        )

    def prune(self, weight: Tensor, statistic: Gram, target: Target) -> Pruned:
        with full_float32():
            spectrum = statistic.remember(("spectrum", self.damping), lambda: decompose(statistic.gram, self.damping))
            problem = spectrum.problem
            dense = problem.into(weight)
            sparse, keep, settled = self._alternate(dense, spectrum, target)
            solved = solve_masked(dense, sparse, keep, problem.scaled, self.refit_rounds)
            result = problem.out_of(solved)
        refuse_if(~torch.isfinite(result).all(), NumericalError("the alternation gave NaN or infinite weights"))
        events = () if settled else (f"the mask of alps still changed after {self.rounds} rounds",)
        return Pruned(result, keep, events)

    def _alternate(self, dense: Tensor, spectrum: Spectrum, target: Target) -> tuple[Tensor, Tensor, bool]:
        """Sparse weights of the scaled problem, their mask, and whether it stood still in the end."""
        pull = dense @ spectrum.problem.scaled
        keep = target.keep(dense.abs(), self.group)
        sparse = dense.masked_fill(~keep, 0.0)
        dual = torch.zeros_like(dense)
        rho, seen = self.rho, keep
        inverse = shifted_inverse(spectrum, rho)
        for done in range(1, self.rounds + 1):
            best = (pull - dual + rho * sparse) @ inverse
            candidate = best + dual / rho
            keep = target.keep(candidate.abs(), self.group)
            sparse = candidate.masked_fill(~keep, 0.0)
            dual = dual + rho * (best - sparse)
            if done % self.rounds_per_rho == 0:
                changed, kept = torch.stack([(keep != seen).sum(), keep.sum()]).tolist()
                if changed == 0:
                    return sparse, keep, True
                share = changed / max(kept, 1)
                rho *= next(factor for least, factor in GROWTH if share >= least)
                seen, inverse = keep, shifted_inverse(spectrum, rho)
        return sparse, keep, False


def decompose(gram: Tensor, damping: float) -> Spectrum:
    """Damp a Gram matrix by a fraction of its mean diagonal, scale it, and decompose it in float64.

    As the authors do, the damping comes before the scaling: inputs that are small beside the others are hardly trusted,
    and count for little. Dead inputs keep a scale of zero, so that what multiplies them falls first.

    Args:
        gram: I × I float32.
        damping: above 0.

    Raises:
        NumericalError: the matrix is not finite.
    """
    if not bool(torch.isfinite(gram).all()):  # now, since a decomposition of such a matrix is an error of another kind
        raise NumericalError("the Gram matrix holds NaN or infinite values")
    alive, floor = gram.diagonal() > 0, damping * gram.diagonal().mean()
    damped = gram + torch.diag(floor.expand(len(gram)))
    scaled, scale = scale_gram(damped, 0.0)
    values, vectors = torch.linalg.eigh(scaled.double())
    # Rounding in the sums can leave eigenvalues slightly below their true lower bound, or below zero.
    least = torch.where(alive.any(), floor / damped.diagonal().max(), 0.0).double()
    return Spectrum(ScaledGram(scaled, scale * alive), values.clamp_min(least).float(), vectors.float())


def shifted_inverse(spectrum: Spectrum, rho: float) -> Tensor:
    """(Ĝ + ρI)⁻¹, I × I float32."""
    return (spectrum.vectors / (spectrum.values + rho)) @ spectrum.vectors.T
