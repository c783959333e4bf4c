"""ADMM: alternate between the best weights and the nearest sparse ones (arXiv 2401.02938).

The weights are scaled by their input norms first, so that the nearest sparse matrix is Wanda's choice. The mask
tightens gradually over the first rounds and is then fixed while the weights settle.

Two departures from the authors' code, toward their paper: the gradual schedule also applies to unstructured masks, and
4:8 keeps four of every eight (their code prunes it as 2:4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError
from coprune.base.kernels.shifted import inverse_of_factor
from coprune.base.method_options import require_positive
from coprune.base.precision import full_float32
from coprune.base.reading import refuse_if
from coprune.model.walk.statistics import Gram
from coprune.pruning.linear_algebra import ScaledGram, damped_cholesky, scale_gram
from coprune.pruning.methods.base import Pruned
from coprune.pruning.solver_events import Event
from coprune.recipe.pattern import Group, Target


@dataclass(frozen=True)
class ADMM:
    """Prune gradually while solving for the kept weights.

    Paper: arXiv 2401.02938.
    """

    rounds: int = 20
    """Number of alternations."""
    mask_rounds: int = 15
    """Number of initial rounds that choose the mask anew, on a cubic sparsity schedule."""
    damping: float = 0.1
    """Added to the unit diagonal of the scaled Gram matrix."""
    rho: float = 1.0
    """Strength of the pull toward the sparse weights."""
    group: Group = "matrix"
    """Weights that compete when the pattern is unstructured."""

    statistic: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        require_positive(rounds=self.rounds, mask_rounds=self.mask_rounds, damping=self.damping, rho=self.rho)
        if self.mask_rounds > self.rounds:
            raise BadInput(
                f"{self.mask_rounds} mask_rounds do not fit into {self.rounds} rounds",
                field="mask_rounds",
                value=self.mask_rounds,
            )

    def prune(self, weight: Tensor, statistic: Gram, target: Target) -> Pruned:
        with full_float32():
            problem, inverse, events = statistic.remember(
                ("admm", self.damping, self.rho), lambda: self._prepare(statistic)
            )
            dense = problem.into(weight)
            pull = dense @ problem.scaled
            best = dense
            dual = torch.zeros_like(dense)
            keep = torch.ones_like(dense, dtype=torch.bool)
            for done in range(self.rounds):
                candidate = best + dual
                if done < self.mask_rounds:
                    keep = keep_on_schedule(candidate.abs(), target, (done + 1) / self.mask_rounds, self.group)
                sparse = candidate.masked_fill(~keep, 0.0)
                dual = candidate - sparse
                best = (pull + self.rho * (sparse - dual)) @ inverse
            result = problem.out_of(best + dual).masked_fill(~keep, 0.0)
        refuse_if(~torch.isfinite(result).all(), NumericalError("the alternation gave NaN or infinite weights"))
        return Pruned(result, keep, events)

    def _prepare(self, statistic: Gram) -> tuple[ScaledGram, Tensor, tuple[Event, ...]]:
        """Return the scaled problem and (Ĝ + ρI)⁻¹, shared by all matrices with the same statistic."""
        problem = scale_gram(statistic.gram, self.damping)
        # Damping and ρ are absolute, since the diagonal is one; damped_cholesky adds far less than either.
        shifted = problem.scaled + self.rho * torch.eye(statistic.width, device=problem.scaled.device)
        lower, events = damped_cholesky(shifted, 1e-7)
        return problem, inverse_of_factor(lower), events


def keep_on_schedule(score: Tensor, target: Target, progress: float, group: Group) -> Tensor:
    """Choose the mask after a share `progress` of the mask rounds.

    The sparsity is s · (1 − (1 − progress)³). For N:M the N largest of every group are always kept, and of the others the
    smallest of the whole matrix (or row) go first.

    Args:
        score: O × I float32.
        target: final pattern and sparsity.
        progress: 0 < progress ≤ 1.
        group: weights that compete where the pattern leaves that open.

    Returns:
        O × I bool; at progress 1 exactly the target's mask.
    """
    sparsity = target.sparsity * (1 - (1 - progress) ** 3)
    return target.pattern.choose_early(score, target.sparsity, sparsity, group)
