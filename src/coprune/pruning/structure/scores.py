"""Which channels or heads of a block are kept: the published scores, and the one that removes what costs least.

Shapes: O × C is the consumer, the matrix whose inputs the channels are (a down projection, an output projection). A unit
is what is removed as a whole: one channel, or the K channels of a key-value head with all its query heads. U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coprune.base.kernels.shifted import inverse_of_factor
from coprune.base.options import one_of, require_positive
from coprune.base.precision import full_float32, total
from coprune.model.walk.statistics import Gram
from coprune.pruning.linear_algebra import damped_cholesky
from coprune.recipe.choice import Choice

Curve = list[tuple[Tensor, float]]
"""What is kept (U bool) at several numbers of units, and the squared error of the consumer's outputs then, a token."""


class Score(Protocol):
    """Chooses the units that are kept."""

    @property
    def refit(self) -> bool:
        """Whether the consumer's kept columns are solved for anew."""
        ...

    def keep(self, weight: Tensor, statistic: Gram, units: Tensor, count: int) -> Tensor:
        """Choose units.

        Args:
            weight: the consumer, O × C float32.
            statistic: of its inputs.
            units: the columns of every unit, U × K int64.
            count: how many units to keep.

        Returns:
            U bool, True where kept.
        """
        ...


@dataclass(frozen=True)
class Magnitude:
    """Keep the units whose columns have the largest norm."""

    refit: bool = False

    def keep(self, weight: Tensor, statistic: Gram, units: Tensor, count: int) -> Tensor:
        return by_norm(weight, units, count)


@dataclass(frozen=True)
class WandaSP:
    """Keep the units with the largest ‖W_:c‖ · n_c, n the root mean square of the input (arXiv 2306.11695, 2312.11983)."""

    refit: bool = False

    def keep(self, weight: Tensor, statistic: Gram, units: Tensor, count: int) -> Tensor:
        score = weight.square().sum(dim=0) * statistic.mean_square
        return largest(score[units].sum(dim=1), count)


@dataclass(frozen=True)
class FLAP:
    """Keep the units with the largest Var(x_c) · ‖W_:c‖²: what hardly varies can go (arXiv 2312.11983).

    The authors put the mean of what is removed into the consumer's bias. Most language models have none, so here the
    refit, if it is asked for, makes up for it.
    """

    refit: bool = False

    def keep(self, weight: Tensor, statistic: Gram, units: Tensor, count: int) -> Tensor:
        variance = (statistic.mean_square - statistic.mean.square()).clamp_min(0)
        return largest((weight.square().sum(dim=0) * variance)[units].sum(dim=1), count)


@dataclass(frozen=True)
class OBS:
    """Remove, a few at a time, the units whose loss the others make up for best.

    The error of removing the columns R of W, when the others are free to change, is tr(W_R (H⁻¹_RR)⁻¹ W_Rᵀ) with H the
    damped Gram matrix (the optimal brain surgeon on columns, as in arXiv 2203.07259 for heads and channels).
    """

    refit: bool = True
    damping: float = 0.01
    """Added to the Gram matrix, as a fraction of its mean diagonal."""
    steps: int = 32
    """In how many steps the units are removed."""

    def __post_init__(self) -> None:
        require_positive(damping=self.damping, steps=self.steps)

    def keep(self, weight: Tensor, statistic: Gram, units: Tensor, count: int) -> Tensor:
        with full_float32():
            surgery = Surgery.on(weight, statistic, units, self.damping)
            while (surplus := int(surgery.left.sum()) - count) > 0:
                surgery.remove(min(surplus, max(1, -(-(len(units) - count) // self.steps))))
        return surgery.left


@dataclass
class Surgery:
    """Units on their way out, a few at a time; what is left of the weight makes up for what went."""

    units: Tensor
    left: Tensor
    """U bool."""
    current: Tensor
    """O × C: the weight, solved for anew."""
    inverse: Tensor
    """C × C, of the damped Gram matrix of the columns that are left."""
    lost: float = 0.0
    """Squared error of the outputs so far, a token."""

    @classmethod
    def on(cls, weight: Tensor, statistic: Gram, units: Tensor, damping: float) -> Surgery:
        """With all units there. Arguments as of `Score.keep`; damping: as of `OBS`."""
        lower, _ = damped_cholesky(statistic.gram, damping)
        left = torch.ones(len(units), dtype=torch.bool, device=weight.device)
        return cls(units, left, weight.clone(), inverse_of_factor(lower))

    def remove(self, number: int) -> None:
        """Remove so many of the units that cost least."""
        current, inverse = self.current, self.inverse
        cost = removal_cost(current, inverse, self.units).masked_fill(~self.left, torch.inf)
        chosen = cost.topk(number, largest=False).indices
        self.left[chosen] = False
        columns = self.units[chosen].flatten()
        gone = current[:, columns]
        self.lost += float((gone * torch.linalg.solve(inverse[columns][:, columns], gone.T).T).sum())
        push = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        current -= gone @ push
        inverse -= inverse[:, columns] @ push
        # What was removed stays removed, whatever rounding leaves there.
        inverse[columns], inverse[:, columns] = 0.0, 0.0
        inverse[columns, columns] = 1.0
        current[:, columns] = 0.0


def curve(score: Score, weight: Tensor, statistic: Gram, units: Tensor, counts: Sequence[int]) -> Curve:
    """What keeping fewer and fewer units costs; those kept are among those kept before.

    Args:
        score: chooses them, and says whether what is left is solved for anew.
        weight, statistic, units: as of `Score.keep`.
        counts: descending.
    """
    if isinstance(score, OBS):
        return _in_one_go(score, weight, statistic, units, counts)
    found, whole = Curve(), energy(weight, statistic)
    for count in counts:
        keep = score.keep(weight, statistic, units, count)
        columns = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        columns[units[keep].flatten()] = True
        left = refitted(weight, statistic, columns) if score.refit else weight.masked_fill(~columns, 0.0)
        found.append((keep, whole * statistic.relative_error(weight, left)))
    return found


def energy(weight: Tensor, statistic: Gram) -> float:
    """‖XWᵀ‖² / T, of all tokens seen. weight: O × C float32."""
    with full_float32():
        return float(total((weight @ statistic.gram) * weight))


def _in_one_go(score: OBS, weight: Tensor, statistic: Gram, units: Tensor, counts: Sequence[int]) -> Curve:
    """The whole curve from one removal that goes on to the last count."""
    found, most = Curve(), max(1, len(units) // (3 * score.steps))  # as fine as removing a third in all steps
    with full_float32():
        surgery = Surgery.on(weight, statistic, units, score.damping)
        for count in counts:
            while (surplus := int(surgery.left.sum()) - count) > 0:
                surgery.remove(min(surplus, most))
            found.append((surgery.left.clone(), surgery.lost))
    return found


SCORES: dict[str, Score] = {"magnitude": Magnitude(), "wanda_sp": WandaSP(), "flap": FLAP(), "obs": OBS()}
"""Every score of channels and heads by its name."""


def score_named(asked: Choice) -> Score:
    """Look up a score with its options. Raises BadInput for an unknown name or option."""
    return one_of(SCORES, "score", asked.name, asked.options)


def by_norm(weight: Tensor, units: Tensor, count: int) -> Tensor:
    """Keep the units whose columns have the largest norm: U bool. weight: O × C; units: U × K."""
    return largest(weight.square().sum(dim=0)[units].sum(dim=1), count)


def largest(score: Tensor, count: int) -> Tensor:
    """True for the `count` largest entries; of equal ones, the first."""
    keep = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    keep[score.argsort(descending=True, stable=True)[:count]] = True
    return keep


def removal_cost(weight: Tensor, inverse: Tensor, units: Tensor) -> Tensor:
    """tr(W_R (H⁻¹_RR)⁻¹ W_Rᵀ) for every unit R: U. weight: O × C; inverse: H⁻¹, C × C; units: U × K."""
    own = inverse[units[:, :, None], units[:, None, :]]
    parts = weight[:, units].permute(1, 2, 0)
    cost: Tensor = (parts * torch.linalg.solve(own, parts)).sum(dim=(1, 2))
    return cost


LEAST_DAMPING = 0.01
"""Of a refit, however many tokens it sees."""


def refitted(weight: Tensor, statistic: Gram, keep: Tensor, damping: float | None = None) -> Tensor:
    """The consumer whose kept columns give what all gave, as well as they can: W_k = W H_:k H_kk⁻¹, zeros elsewhere.

    Args:
        weight: O × C float32.
        statistic: of its inputs.
        keep: C bool.
        damping: added to the Gram matrix, as a fraction of its mean diagonal; by default C / T for T tokens, since what few
            tokens say of many columns is mostly noise.
    """
    with full_float32():
        gram = statistic.gram
        damping = max(LEAST_DAMPING, len(keep) / statistic.count) if damping is None else damping
        gram.diagonal().add_(damping * gram.diagonal().mean())
        lower, _ = damped_cholesky(gram[keep][:, keep], 1e-7)
        solved = torch.cholesky_solve(gram[keep] @ weight.T, lower).T
    result = torch.zeros_like(weight)
    result[:, keep] = solved
    return result
