"""Scores of channels and heads against their formulas, and refitting against least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coprune.model.kept_slices import KeptSlices
from coprune.model.walk.statistics import Gram
from coprune.removal.channels_and_heads import kept_count
from coprune.removal.unit_scores import FLAP, OBS, Magnitude, WandaSP, refitted, removal_cost

OUT, CHANNELS, TOKENS = 12, 16, 200
ALONE = torch.arange(CHANNELS)[:, None]
HEADS = torch.arange(CHANNELS).view(4, 4)


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Gram]:
    """Return a weight, correlated inputs, and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(CHANNELS, CHANNELS, generator=generator) / 3 + torch.eye(CHANNELS)
    x = torch.randn(TOKENS, CHANNELS, generator=generator) @ mix + 0.3
    statistic = Gram(CHANNELS)
    statistic.update(x)
    return torch.randn(OUT, CHANNELS, generator=generator), x, statistic


def kept(score: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros(len(score), dtype=torch.bool).scatter(0, score.topk(count).indices, True)


@pytest.mark.parametrize("units", [ALONE, HEADS], ids=["channels", "heads"])
def test_published_scores_match_their_formulas(units: torch.Tensor) -> None:
    weight, x, statistic = problem()
    count = len(units) // 2
    norms = weight.norm(dim=0) ** 2
    by_norm = norms[units].sum(dim=1)
    assert torch.equal(Magnitude().keep(weight, statistic, units, count), kept(by_norm, count))
    by_wanda = (norms * x.square().mean(dim=0))[units].sum(dim=1)
    assert torch.equal(WandaSP().keep(weight, statistic, units, count), kept(by_wanda, count))
    by_flap = (norms * x.var(dim=0, correction=0))[units].sum(dim=1)
    assert torch.equal(FLAP().keep(weight, statistic, units, count), kept(by_flap, count))


def least_error(weight: torch.Tensor, x: torch.Tensor, keep: torch.Tensor) -> float:
    """Return the least-squares error of the outputs with only these columns."""
    wanted = x.double() @ weight.double().T
    solution = torch.linalg.lstsq(x[:, keep].double(), wanted).solution
    return float((x[:, keep].double() @ solution - wanted).square().sum())


@pytest.mark.parametrize("units", [ALONE, HEADS], ids=["channels", "heads"])
def test_the_cost_of_a_unit_is_the_error_that_other_columns_cannot_compensate(units: torch.Tensor) -> None:
    weight, x, statistic = problem()
    cost = removal_cost(weight, torch.linalg.inv(statistic.gram), units) * TOKENS
    for unit, columns in enumerate(units):
        keep = torch.ones(CHANNELS, dtype=torch.bool)
        keep[columns] = False
        assert float(cost[unit]) == pytest.approx(least_error(weight, x, keep), rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_the_refit_is_least_squares_and_obs_is_better_after_it(seed: int) -> None:
    weight, x, statistic = problem(seed)

    def error(keep: torch.Tensor) -> float:
        solved = refitted(weight, statistic, keep, damping=1e-7)
        assert not solved[:, ~keep].any()
        found = float((x @ (solved - weight).T).square().sum())
        assert found == pytest.approx(least_error(weight, x, keep), rel=1e-2)
        return found

    chosen = OBS(damping=1e-6, steps=CHANNELS).keep(weight, statistic, ALONE, CHANNELS // 2)
    assert int(chosen.sum()) == CHANNELS // 2
    assert error(chosen) <= error(WandaSP().keep(weight, statistic, ALONE, CHANNELS // 2))


@pytest.mark.parametrize("seed", range(3))
def test_refitting_on_few_tokens_damps_enough_for_unseen_tokens(seed: int) -> None:
    """With 1.5 tokens per column; measured by the error on other tokens."""
    generator = torch.Generator().manual_seed(seed)
    columns = 64
    mix = torch.randn(columns, columns, generator=generator) / 24 + torch.eye(columns)
    seen, others = torch.randn(2, 3 * columns // 2, columns, generator=generator) @ mix
    statistic, keep = Gram(columns), torch.arange(columns) % 3 > 0
    statistic.update(seen)
    weight = torch.randn(OUT, columns, generator=generator)

    def error(solved: torch.Tensor) -> float:
        return float((others @ (solved - weight).T).norm() / (others @ weight.T).norm())

    assert error(refitted(weight, statistic, keep)) < 0.9 * error(refitted(weight, statistic, keep, damping=0.01))


@given(units=st.integers(1, 4096), share=st.floats(0.01, 0.99), align=st.sampled_from([1, 16, 64, 100]))
def test_the_requested_number_is_kept_in_multiples(units: int, share: float, align: int) -> None:
    found = kept_count(units, share, align)
    assert 1 <= found <= units
    step = max(s for s in (align, 32, 16, 8, 4, 2, 1) if found % s == 0)
    assert abs(found - units * (1 - share)) <= max(step, align)
    if units % align == 0 and units > align:
        assert found % align == 0


@settings(max_examples=30)
@given(data=st.data())
def test_slices_expand_again_with_zeros(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim] - 1))
    ranges = [(start, shape[dim])] if start else [(0, 1)]
    slices = KeptSlices(dim=dim, size=shape[dim], ranges=[ranges])
    tensor = torch.randn(shape)
    small = slices.cut(tensor)
    again = slices.uncut(small)
    assert again.shape == tensor.shape
    assert torch.equal(slices.cut(again), small)
    assert int((again != 0).sum()) == small.numel()


def test_every_expert_may_keep_different_slices() -> None:
    slices = KeptSlices(dim=2, size=4, ranges=[[(0, 2)], [(1, 2), (3, 4)]])
    tensor = torch.randn(2, 3, 4)
    small = slices.cut(tensor)
    assert torch.equal(small[0], tensor[0][:, :2])
    assert torch.equal(small[1], tensor[1][:, [1, 3]])
    assert torch.equal(slices.cut(slices.uncut(small)), small)
