"""ALPS: an alternation with a growing penalty until the mask settles, then a solve on that mask (arXiv 2406.07831).

The same splitting as ADMM, but the mask is free in every round and ρ rises as fast as the mask settles. On a CPU one
eigendecomposition of the Gram matrix makes (Ĝ + ρI)⁻¹ cheap for every ρ; on other devices each ρ has its own factor
(`base/kernels/shifted`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.base.kernels.kernel_table import kernel
from coprune.base.kernels.shifted import Inverse
from coprune.base.method_options import require_positive
from coprune.base.precision import full_float32
from coprune.base.reading import Questions, refuse_if
from coprune.model.walk.statistics import Gram
from coprune.pruning.linear_algebra import ScaledGram, scale_gram
from coprune.pruning.masked_fit import Rounds, solve_masked
from coprune.pruning.methods.base import Pruned
from coprune.pruning.solver_events import Event
from coprune.recipe.pattern import Group, Target

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Factors of ρ: (minimum changed share of the kept weights, factor)."""


class Shared(NamedTuple):
    """Quantities that matrices with the same inputs share: the scaled problem, and its (Ĝ + ρI)⁻¹ for every ρ."""

    problem: ScaledGram
    inverse: Inverse


class State(NamedTuple):
    """The state of the alternation: sparse weights of the scaled problem (O × I float32), and their mask."""

    sparse: Tensor
    keep: Tensor


@dataclass(frozen=True)
class ALPS:
    """Prune by an alternation with rising penalty, then solve for the remaining weights.

    Paper: arXiv 2406.07831.
    """

    rho: float = 0.1
    """The penalty at the start."""
    rounds: int = 300
    """Maximum number of rounds; stops as soon as the mask settles."""
    rounds_per_rho: int = 3
    """Number of rounds after which the mask is checked and ρ raised."""
    damping: float = 0.01
    """Added to the Gram matrix's diagonal before it is scaled, as a fraction of its mean."""
    refit_rounds: int = 10
    """Rounds of conjugate gradients on the final mask."""
    group: Group = "matrix"
    """Weights that compete when the pattern is unstructured."""

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
            key = ("alps", self.damping, self.rho)
            shared = statistic.remember(key, lambda: prepare(statistic.gram, self.damping, self.rho))
            problem = shared.problem
            dense = problem.into(weight)
            (sparse, keep), settled = self._alternate(dense, shared, target)
            solved = solve_masked(dense, sparse, keep, problem.scaled, Rounds(self.refit_rounds))
            result = problem.out_of(solved)
        refuse_if(~torch.isfinite(result).all(), NumericalError("the alternation gave NaN or infinite weights"))
        events = () if settled else (Event(kind="mask unsettled", figures={"rounds": self.rounds}),)
        return Pruned(result, keep, events)

    def _alternate(self, dense: Tensor, shared: Shared, target: Target) -> tuple[State, bool]:
        """Run the alternation; return its state, and whether the mask settled."""
        pull = dense @ shared.problem.scaled
        keep = target.keep(dense.abs(), self.group)
        sparse = dense.masked_fill(~keep, 0.0)
        dual = torch.zeros_like(dense)
        rho, seen = torch.full((), self.rho, dtype=torch.float64, device=dense.device), keep
        inverse = shared.inverse(rho)
        settled: Questions[State] = Questions()
        for done in range(1, self.rounds + 1):
            best = (pull - dual + rho * sparse) @ inverse
            candidate = best + dual / rho
            keep = target.keep(candidate.abs(), self.group)
            sparse = candidate.masked_fill(~keep, 0.0)
            dual = dual + rho * (best - sparse)
            if done % self.rounds_per_rho == 0:
                changed = (keep != seen).sum()
                state = settled.ask(changed == 0, State(sparse, keep))
                if state is not None:
                    return state, True
                rho = rho * growth(changed, keep.sum())
                seen, inverse = keep, shared.inverse(rho)
        state = settled.rest()
        return (State(sparse, keep), False) if state is None else (state, True)


def growth(changed: Tensor, kept: Tensor) -> Tensor:
    """Return the factor by which ρ grows, a float64 scalar. changed, kept: counts of weights, scalars."""
    share = changed.double() / kept.clamp_min(1)
    factor = torch.full_like(share, GROWTH[-1][1])
    for least, larger in reversed(GROWTH[:-1]):
        factor = factor.masked_fill(share >= least, larger)
    return factor


def prepare(gram: Tensor, damping: float, rho: float) -> Shared:
    """Damp a Gram matrix by a fraction of its mean diagonal, scale it, and prepare for every penalty.

    Like the authors, damp before scaling: inputs that are small compared with others are hardly trusted and count little.
    Dead inputs keep a scale of zero, so their weights go first.

    Args:
        gram: I × I float32.
        damping: above 0.
        rho: the smallest penalty, above 0.

    Raises:
        NumericalError: the matrix is not finite.
    """
    alive, floor = gram.diagonal() > 0, damping * gram.diagonal().mean()
    damped = gram + torch.diag(floor.expand(len(gram)))
    scaled, scale = scale_gram(damped, 0.0)
    # Rounding in the sums can leave eigenvalues slightly below their true lower bound, or below zero.
    least = torch.where(alive.any(), floor / damped.diagonal().max(), 0.0)
    inverse = kernel("shifted_inverses", scaled.device)(scaled, least, rho)
    return Shared(ScaledGram(scaled, scale * (alive | ~alive.any())), inverse)
