"""Statistics are the same for tokens in one batch, in several, or from several processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.model.walk.statistics import Gram, InputMoments, InputNorm, Statistic

KINDS = [InputNorm, InputMoments, Gram]


def inputs(tokens: int = 40, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(cut=st.integers(0, 40), seed=st.integers(0, 100))
def test_batches_and_merging_give_the_same_sums(kind: type[Statistic], cut: int, seed: int) -> None:
    x = inputs(seed=seed)
    whole, first, second = kind(6), kind(6), kind(6)
    whole.update(x)
    first.update(x[:cut])
    second.update(x[cut:].reshape(1, -1, 6))
    first.merge(second)
    assert first.count == whole.count == 40
    for name, total in whole.sums.items():
        torch.testing.assert_close(first.sums[name], total)
        assert total.shape == kind.shapes(6)[name]


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_means(kind: type[Statistic]) -> None:
    x = inputs().to(torch.bfloat16)
    statistic = kind(6)
    statistic.update(x)
    torch.testing.assert_close(statistic.mean_square, x.float().square().mean(dim=0))
    torch.testing.assert_close(statistic.root_mean_square, x.float().square().mean(dim=0).sqrt())
    if isinstance(statistic, InputMoments | Gram):
        torch.testing.assert_close(statistic.mean, x.float().mean(dim=0))


def test_gram_of_batches_equals_gram_of_all_rows() -> None:
    x, gram = inputs(seed=2), Gram(6)
    for rows in (slice(0, 15), slice(15, 40)):
        gram.update(x[rows])
    torch.testing.assert_close(gram.gram, x.T @ x / 40)


def test_no_tokens_give_zeros() -> None:
    assert not InputNorm(3).root_mean_square.any()
    assert not Gram(3).gram.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_raise_a_numerical_error(bad: float) -> None:
    x = inputs()
    x[3, 2] = bad
    for kind in KINDS:
        with pytest.raises(NumericalError):
            kind(6).update(x)


def test_derived_values_are_cached_until_the_next_update() -> None:
    statistic = Gram(6)
    statistic.update(inputs())
    assert statistic.remember("answer", lambda: 1) == statistic.remember("answer", lambda: 2) == 1
    statistic.update(inputs())
    assert statistic.remember("answer", lambda: 3) == 3


def test_the_relative_layer_error_is_that_of_the_outputs() -> None:
    x, weight = inputs(), torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    pruned = weight * (weight.abs() > 0.5)
    statistic = Gram(6)
    statistic.update(x)
    expected = (x @ (weight - pruned).T).square().sum() / (x @ weight.T).square().sum()
    assert statistic.relative_error(weight, pruned) == pytest.approx(float(expected), rel=1e-4)
    assert statistic.relative_error(torch.zeros(4, 6), torch.zeros(4, 6)) == 0.0
