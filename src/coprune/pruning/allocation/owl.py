"""OWL: blocks with more outliers in their scores are pruned less (Outlier Weighed Layerwise sparsity, arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coprune.base.method_options import require_not_negative, require_positive
from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.pruning.allocation.allocation import Shown, Unit, wish, within_budget
from coprune.pruning.methods.wanda import wanda_score
from coprune.recipe.pattern import Target


@dataclass(frozen=True)
class OWL:
    """Keep a share of each block's weights that grows with its share of outliers.

    Paper: Outlier Weighed Layerwise sparsity, arXiv 2310.05175.
    """

    threshold: float = 5.0
    """An outlier is a score |W|·n above this multiple of its block's mean."""
    spread: float = 0.08
    """Half the distance between the largest and the smallest share of kept weights (the paper's λ)."""
    first: int = 0
    """Number of leading calibration tokens to use, in whole batches; 0: all."""

    measures: ClassVar[bool] = True
    statistic: ClassVar[type[Statistic]] = InputNorm

    def __post_init__(self) -> None:
        require_positive(threshold=self.threshold)
        require_not_negative(spread=self.spread, first=self.first)

    def measure(self, shown: Sequence[Shown], target: Target) -> dict[str, Tensor]:
        """Count each matrix's outliers and entries; scores are computed twice rather than kept."""
        known = [(matrix, statistic) for matrix, statistic in shown if statistic is not None]
        total, entries = 0.0, 0
        for matrix, statistic in known:
            score = wanda_score(matrix.read(), statistic)
            total += float(score.sum(dtype=torch.float64))
            entries += score.numel()
        limit = self.threshold * total / max(entries, 1)
        found = {}
        for matrix, statistic in known:
            score = wanda_score(matrix.read(), statistic)
            found[matrix.name] = torch.tensor([float((score > limit).sum()), score.numel()], dtype=torch.float64)
        return found

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        found: dict[str, Tensor] = {}
        for unit in units:
            if unit.name in sums:
                found[unit.place] = found.get(unit.place, torch.zeros(2, dtype=torch.float64)) + sums[unit.name]
        shares = torch.tensor([_share(found.get(unit.place)) for unit in units], dtype=torch.float64)
        counts = torch.tensor([unit.weights for unit in units], dtype=torch.float64)
        kept = kept_by_outliers(shares, counts, 1 - target.sparsity, self.spread)
        wishes = [wish(1 - float(ratio), unit) for ratio, unit in zip(kept, units, strict=True)]
        return within_budget(units, wishes, target)


def _share(found: Tensor | None) -> float:
    return 0.0 if found is None else float(found[0] / found[1])


def kept_by_outliers(shares: Tensor, counts: Tensor, kept: float, spread: float) -> Tensor:
    """Map shares of outliers linearly to shares of kept weights, at most 2 · spread apart.

    Args:
        shares: float64, one per unit.
        counts: float64, the units' weights.
        kept: the overall share of kept weights.
        spread: half the distance between the largest and the smallest share.

    Returns:
        Shares of kept weights whose mean, weighted by counts, is `kept` (the authors weigh all blocks equally). They may
        lie outside [0, 1].
    """
    distance = shares.max() - shares.min()
    if float(distance) == 0:
        return torch.full_like(shares, kept)
    ratio = (shares - shares.min()) / distance * 2 * spread
    return ratio - (ratio * counts).sum() / counts.sum() + kept
