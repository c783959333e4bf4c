"""Expert scores against their formulas, and the choice of experts for one or several domains."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from coprune.base.errors import BadInput
from coprune.recipe.choice import Choice
from coprune.recipe.structure import SCORES
from coprune.removal.block_scores import BLOCK_SCORES
from coprune.removal.expert_calls import Routed
from coprune.removal.expert_scores import (
    AIMER,
    EXPERT_SCORES,
    REAP,
    ExpertSums,
    Frequency,
    RandomExperts,
    WeightSums,
    coverage,
    expert_score_named,
    kept_experts,
)
from coprune.removal.unit_scores import SCORES as UNITS

INDEX = torch.tensor([[0, 1], [0, 2], [1, 0]])
GATES = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]])
# Answers of length 5, 13 and 1 for the experts 0, 1 and 2.
ANSWERS = torch.tensor([[3.0, 4.0], [5.0, 12.0], [0.0, 1.0]])[INDEX]


def sums() -> ExpertSums:
    found = ExpertSums.empty(4)
    found.update(Routed(INDEX, GATES, ANSWERS))
    return found


def test_expert_scores_match_their_formulas() -> None:
    reap = REAP().score(sums(), 0)
    expected = [(0.75 + 0.5 + 0.1) * 5 / 3, (0.25 + 0.9) * 13 / 2, 0.5 * 1, 0]
    torch.testing.assert_close(reap, torch.tensor(expected, dtype=torch.float64))
    frequency = Frequency().score(sums(), 0)
    torch.testing.assert_close(frequency, torch.tensor([3, 2, 1, 0], dtype=torch.float64) / 6)
    both = sums()
    both.add(sums())
    torch.testing.assert_close(REAP().score(both, 0), reap)  # a mean, so twice the tokens change nothing
    one, other = (RandomExperts().score(sums(), block) for block in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(one, RandomExperts().score(sums(), 0))


def test_score_names_and_options_are_complete() -> None:
    named = {
        "units": set(UNITS),
        "blocks": set(BLOCK_SCORES),
        "experts": set(EXPERT_SCORES),
        "rows": {"counts"},
    }
    assert named == {kind: set(names) for kind, names in SCORES.items()}
    seeded = expert_score_named(Choice.of("random:seed=1"))
    assert isinstance(seeded, RandomExperts)
    assert not torch.equal(seeded.score(sums(), 0), RandomExperts().score(sums(), 0))
    with pytest.raises(BadInput, match="unknown score"):
        expert_score_named(Choice(name="reep"))
    with pytest.raises(BadInput, match="has no options"):
        expert_score_named(Choice.of("reap:seed=1"))


def test_aimer_scores_the_spread_of_weight_magnitudes() -> None:
    found = WeightSums.empty(3)
    for expert, matrices in enumerate([[[1.0, -1.0], [1.0]], [[3.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [-1.0]]]):
        for matrix in matrices:
            found.update(expert, torch.tensor(matrix))
    expected = torch.tensor([1.0, 1.5 / 0.75, 3**0.5 / (5 / 3)], dtype=torch.float64)
    torch.testing.assert_close(AIMER().score_weights(found), expected)


def test_every_group_keeps_equally_many() -> None:
    score = {"text": torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)}
    assert kept_experts(score, 4, 1, None).tolist() == [True] * 4 + [False] * 4
    assert kept_experts(score, 4, 2, None).nonzero().flatten().tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_max_min_is_near_the_best_of_all_choices(seed: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(8, generator=generator, dtype=torch.float64) ** 3 for name in ("a", "b", "c")}
    keep = kept_experts(scores, 4, groups, None)
    assert keep.view(groups, -1).sum(dim=1).tolist() == [4 // groups] * groups
    worst = min(coverage(scores, keep).values())
    every = [torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(c), True) for c in combinations(range(8), 4)]
    allowed = [one for one in every if one.view(groups, -1).sum(dim=1).tolist() == [4 // groups] * groups]
    best = max(min(coverage(scores, one).values()) for one in allowed)
    assert worst >= best - 0.02  # exchanges may end slightly below the optimum
    for name in scores:  # the best choice for one domain is no better for the worst domain
        assert worst >= min(coverage(scores, kept_experts({name: scores[name]}, 4, groups, None)).values()) - 1e-12


def test_domain_weights_apply_to_shares_of_scores() -> None:
    scores = {"loud": torch.tensor([100.0, 1.0, 1.0]), "quiet": torch.tensor([0.1, 0.1, 0.8])}
    scores = {name: score.double() for name, score in scores.items()}
    assert kept_experts(scores, 1, 1, {"loud": 1.0, "quiet": 0.0}).tolist() == [True, False, False]
    assert kept_experts(scores, 1, 1, {"loud": 1.0, "quiet": 2.0}).tolist() == [False, False, True]
