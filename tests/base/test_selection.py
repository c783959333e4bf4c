"""Masks by score: exactly the requested zeros, in the right places, with ties always resolved alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError
from coprune.base.kernels.ranks import FEW_GROUPS
from coprune.base.selection import (
    count_pruned,
    keep_largest,
    keep_n_of_m,
    keep_share,
    refuse_nan,
    tightest_groups,
)

few_values = st.sampled_from([0.0, 1.0, 2.0, 3.0])


@st.composite
def scores(draw: st.DrawFn, divisible_by: int = 1) -> Tensor:
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    width = groups * divisible_by
    values = draw(st.lists(few_values, min_size=rows * width, max_size=rows * width))
    return torch.tensor(values).reshape(rows, width)


@settings(deadline=None, max_examples=60)
@given(score=scores(), sparsity=st.floats(0, 0.99))
def test_rows_lose_the_first_weights_of_a_stable_sort(score: Tensor, sparsity: float) -> None:
    keep = keep_share(score, sparsity, by_row=True)
    pruned = count_pruned(score.shape[1], sparsity)
    expected = torch.ones_like(score, dtype=torch.bool)
    expected.scatter_(1, score.sort(dim=1, stable=True).indices[:, :pruned], False)
    assert torch.equal(keep, expected)


@settings(deadline=None, max_examples=30)
@given(score=scores(), sparsity=st.floats(0, 0.99))
def test_keep_share_drops_the_lowest_scores(score: Tensor, sparsity: float) -> None:
    keep = keep_share(score, sparsity, by_row=False)
    assert int((~keep).sum()) == count_pruned(score.numel(), sparsity)
    if not bool(keep.all()):
        assert score[~keep].max() <= score[keep].min()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4), (7, 20)])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_groups_keep_n_of_m_as_a_stable_sort_would(n: int, m: int, data: st.DataObject) -> None:
    score = data.draw(scores(divisible_by=m))
    keep = keep_n_of_m(score, n, m)
    grouped = score.reshape(-1, m)
    expected = torch.ones_like(grouped, dtype=torch.bool)
    lost = grouped.sort(dim=1, stable=True).indices[:, : m - n]
    expected.scatter_(1, lost, False)
    assert torch.equal(keep, expected.view_as(score))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 16)])
def test_many_groups_are_ranked_like_few(n: int, m: int) -> None:
    score = torch.randint(0, 5, (FEW_GROUPS.host + 1, m), generator=torch.Generator().manual_seed(0)).float()
    few = torch.cat([keep_n_of_m(part, n, m) for part in score.split(FEW_GROUPS.host)])
    assert torch.equal(keep_n_of_m(score, n, m), few)


def test_four_of_eight_is_not_two_of_four() -> None:
    score = torch.arange(8.0).reshape(1, 8)
    assert keep_n_of_m(score, 4, 8).tolist() == [[False] * 4 + [True] * 4]
    assert keep_n_of_m(score, 2, 4).tolist() == [[False, False, True, True] * 2]


def test_counts_are_not_misled_by_binary_fractions() -> None:
    assert count_pruned(100, 0.29) == 29
    assert count_pruned(10, 0.99) == 9
    assert bool(keep_largest(torch.ones(2, 3), 0).all())


def test_bad_scores_are_refused() -> None:
    with pytest.raises(NumericalError):
        refuse_nan(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(BadInput, match="2:4"):
        keep_n_of_m(torch.ones(1, 6), 2, 4)


def test_the_tightest_groups_of_a_mask_are_those_with_the_smallest_m() -> None:
    keep = torch.tensor([True, True, False, False] * 8).repeat(5, 1)
    assert tightest_groups(keep, (2, 4, 8), 0.05) == (2, 4)
    keep[0, :4] = True
    assert tightest_groups(keep, (2, 4, 8), 0.05) is None
    assert tightest_groups(torch.ones(3, 6, dtype=torch.bool), (4,), 0.05) is None
