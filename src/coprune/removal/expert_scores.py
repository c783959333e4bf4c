"""Scores of a mixture's experts, and the choice among them for one domain or several.

E experts. Sums over tokens are gathered once per domain of text and can be blended again and again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.base.method_options import one_of
from coprune.base.words import Set
from coprune.recipe.choice import Choice
from coprune.removal.expert_calls import Routed

_STARTS = 8
"""Number of choices from which exchanges start."""


@dataclass
class ExpertSums:
    """Sums over the tokens routed to each expert, in float64 on the CPU."""

    tokens: Tensor
    """E: number of tokens."""
    weighted: Tensor
    """E: sum of gate · ‖answer‖₂ over the tokens."""

    @classmethod
    def empty(cls, experts: int) -> ExpertSums:
        """Return sums over no tokens."""
        return cls(torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64))

    def update(self, routed: Routed, counted: Tensor | None = None) -> None:
        """Add one call of the experts.

        Args:
            routed: the call, of all tokens of a batch.
            counted: tokens that count, B × S bool; None for all.

        Raises:
            UnsupportedModel: the routed rows cannot be matched to tokens.
        """
        if counted is not None:
            if counted.numel() != len(routed.index):
                raise UnsupportedModel(
                    f"a mixture routes {len(routed.index)} rows of {counted.numel()} tokens, and which ones is unknown",
                    fix=("count all tokens with ", Set("calibrate_on", "all")),
                )
            own = counted.flatten()
            routed = Routed(routed.index[own], routed.gates[own], routed.answers[own])
        index = routed.index.flatten().cpu()
        weighted = routed.gates.to(torch.float64) * torch.linalg.vector_norm(
            routed.answers, dim=-1, dtype=torch.float32
        )
        self.tokens.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
        self.weighted.index_add_(0, index, weighted.flatten().cpu())

    def add(self, other: ExpertSums) -> None:
        """Add the sums over other tokens."""
        self.tokens += other.tokens
        self.weighted += other.weighted


@dataclass
class WeightSums:
    """Sums over the weights of each expert, in float64 on the CPU."""

    count: Tensor
    """E: number of weights."""
    absolute: Tensor
    """E: sum of their magnitudes."""
    squares: Tensor
    """E: sum of their squares."""

    @classmethod
    def empty(cls, experts: int) -> WeightSums:
        """Return sums over no weights."""
        return cls(*(torch.zeros(experts, dtype=torch.float64) for _ in range(3)))

    def update(self, expert: int, weights: Tensor) -> None:
        """Add some weights of an expert."""
        magnitudes = weights.detach().abs().flatten().to(torch.float32)  # read once, where they lie in a file
        self.count[expert] += magnitudes.numel()
        self.absolute[expert] += float(magnitudes.sum())
        self.squares[expert] += float(magnitudes.dot(magnitudes))


class ExpertScore(Protocol):
    """A score of each expert from the tokens routed to it."""

    def score(self, sums: ExpertSums, block: int) -> Tensor:
        """Return E float64; experts with larger values are kept first.

        Args:
            sums: of the tokens of one domain.
            block: number of the block.
        """
        ...


@dataclass(frozen=True)
class REAP:
    """Router-weighted expert activation: the mean of gate · ‖answer‖₂ over the tokens of an expert (arXiv 2510.13999)."""

    def score(self, sums: ExpertSums, block: int) -> Tensor:
        return sums.weighted / sums.tokens.clamp_min(1)


@dataclass(frozen=True)
class Frequency:
    """Share of the tokens that are routed to an expert."""

    def score(self, sums: ExpertSums, block: int) -> Tensor:
        return sums.tokens / sums.tokens.sum().clamp_min(1)


@dataclass(frozen=True)
class RandomExperts:
    """Random experts, the baseline for every other score."""

    seed: int = 0

    def score(self, sums: ExpertSums, block: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + block)
        return torch.rand(len(sums.tokens), dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class AIMER:
    """The root mean square of an expert's weights over the mean of their magnitudes (arXiv 2603.18492); needs no text.

    Experts whose weights all have the same magnitude are the least specialised, and go first.
    """

    def score_weights(self, sums: WeightSums) -> Tensor:
        """Return E float64; experts with larger values are kept first."""
        return (sums.squares * sums.count).sqrt() / sums.absolute.clamp_min(1e-300)


EXPERT_SCORES: dict[str, ExpertScore | AIMER] = {
    "reap": REAP(),
    "frequency": Frequency(),
    "random": RandomExperts(),
    "aimer": AIMER(),
}
"""Scores of experts by name."""


def expert_score_named(asked: Choice) -> ExpertScore | AIMER:
    """Return a score with its options. Raises BadInput for an unknown name or option."""
    return one_of(EXPERT_SCORES, "score", asked.name, asked.options)


def kept_experts(scores: Mapping[str, Tensor], count: int, groups: int, weights: Mapping[str, float] | None) -> Tensor:
    """Choose the experts to keep: equally many per group; of equal scores, the first.

    Args:
        scores: E float64, at least zero, by domain.
        count: experts to keep, a multiple of `groups`.
        groups: number of equal groups, which keep equally many.
        weights: of the domains, to maximise the weighted mean of the kept shares; None maximises the smallest share.

    Returns:
        E bool.
    """
    shares = torch.stack([score / score.sum().clamp_min(1e-300) for score in scores.values()])
    if weights is not None:
        means = torch.tensor([weights[name] for name in scores], dtype=torch.float64)
        return _largest(means @ shares, count, groups)
    if len(shares) == 1:
        return _largest(shares[0], count, groups)
    return _max_min(shares, count, groups)


def coverage(scores: Mapping[str, Tensor], keep: Tensor) -> dict[str, float]:
    """Return the share of its score that each domain keeps. scores: E by domain; keep: E bool."""
    return {name: float(score[keep].sum() / score.sum().clamp_min(1e-300)) for name, score in scores.items()}


def _largest(score: Tensor, count: int, groups: int) -> Tensor:
    keep = torch.zeros(groups, len(score) // groups, dtype=torch.bool)
    order = score.view(groups, -1).argsort(dim=1, descending=True, stable=True)
    return keep.scatter_(1, order[:, : count // groups], True).flatten()


def _max_min(shares: Tensor, count: int, groups: int) -> Tensor:
    """Return the choice that maximises the smallest kept share, by exchanges from the best weighted means.

    shares: D × E, each row sums to one.
    """
    weights, found = torch.full((len(shares),), 1 / len(shares), dtype=torch.float64), list[Tensor]()
    for _ in range(64):
        keep = _largest(weights @ shares, count, groups)
        kept = shares[:, keep].sum(dim=1)
        if not any(torch.equal(keep, other) for other in found):
            found.append(keep)
        # Domains that keep less get more weight in the next step.
        weights = torch.softmax(weights.log() - 4 * (kept - kept.mean()), dim=0)

    def worst(keep: Tensor) -> float:
        return float(shares[:, keep].sum(dim=1).min())

    starts = sorted(found, key=worst, reverse=True)[:_STARTS]
    return max((_exchanged(shares, keep, groups) for keep in starts), key=worst)


def _exchanged(shares: Tensor, keep: Tensor, groups: int) -> Tensor:
    """Swap a kept expert for another of its group while that raises the smallest kept share."""
    group = torch.arange(len(keep)) // (len(keep) // groups)
    while True:
        inside, outside = keep.nonzero().flatten(), (~keep).nonzero().flatten()
        kept = shares[:, keep].sum(dim=1)
        after = (kept[:, None, None] - shares[:, inside, None] + shares[:, None, outside]).amin(dim=0)
        after = after.masked_fill(group[inside, None] != group[outside], -torch.inf)
        place = int(after.argmax()) if after.numel() else 0
        if not after.numel() or float(after.flatten()[place]) <= float(kept.min()) + 1e-12:
            return keep
        keep = keep.clone()
        keep[inside[place // len(outside)]], keep[outside[place % len(outside)]] = False, True
