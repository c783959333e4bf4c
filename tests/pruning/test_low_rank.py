"""A sparse part and one of low rank: the sum is never worse than the sparse part alone, and near the best for its rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError
from coprune.model.low_rank_factors import Factors
from coprune.pruning.low_rank_fit import LowRank, leading_directions
from coprune.pruning.masked_fit import row_errors
from coprune.pruning.methods import METHODS, Pruned
from coprune.recipe.pattern import NM, Target, Unstructured
from support.problems import correlated_layer

patterns = st.sampled_from([Target(Unstructured(), 0.5), Target(Unstructured(), 0.8), Target(NM(2, 4), 0.5)])


def error(weight: Tensor, pruned: Pruned, gram: Tensor) -> float:
    whole = pruned.weight if pruned.added is None else pruned.weight + pruned.added.product()
    return float(row_errors(weight - whole, gram).sum())


def best_share(left: Tensor, gram: Tensor, rank: int) -> float:
    """What share of an error's size no matrix of a rank takes away: by the singular values of R G^½."""
    values, vectors = torch.linalg.eigh(gram.double())
    sizes = torch.linalg.svdvals(left.double() @ (vectors * values.clamp_min(0).sqrt())).square()
    return float(sizes[rank:].sum() / sizes.sum())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm", "alps", "dsnot"])
@settings(max_examples=8, deadline=None)
@given(
    target=patterns,
    seed=st.integers(0, 1000),
    rows=st.integers(1, 24),
    groups=st.integers(1, 3),
    rank=st.integers(1, 8),
    rounds=st.integers(1, 4),
)
def test_never_worse_than_the_method_alone(
    method: str, target: Target, seed: int, rows: int, groups: int, rank: int, rounds: int
) -> None:
    weight, _, statistic = correlated_layer(rows, 16 * groups, tokens=64, seed=seed)
    copy = weight.clone()

    def prune(rest: Tensor) -> Pruned:
        return METHODS[method].prune(rest, statistic, target)

    alone = prune(weight)
    both = LowRank(rank, rounds).split(weight, statistic.gram, prune)
    assert torch.equal(weight, copy)
    assert both.added is not None
    assert both.added.down.shape[0] == min(rank, rows)
    assert torch.equal(both.weight == 0, ~both.keep) or method == "magnitude"
    assert int(both.keep.sum()) == int(alone.keep.sum())
    if isinstance(target.pattern, NM):
        assert bool((both.keep.reshape(-1, 4).sum(dim=1) == 2).all())
    scale = float(row_errors(weight, statistic.gram).sum())
    assert error(weight, both, statistic.gram) <= error(weight, alone, statistic.gram) + 1e-6 * scale


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
@pytest.mark.parametrize("rank", [2, 8])
def test_one_round_is_nearly_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    weight, _, statistic = correlated_layer(*shape, tokens=1024)
    target = Target(NM(2, 4), 0.5)

    def prune(rest: Tensor) -> Pruned:
        return METHODS["sparsegpt"].prune(rest, statistic, target)

    alone, both = prune(weight), LowRank(rank, 1).split(weight, statistic.gram, prune)
    assert torch.equal(both.weight, alone.weight)
    share = error(weight, both, statistic.gram) / error(weight, alone, statistic.gram)
    best = best_share(weight - alone.weight, statistic.gram, rank)
    assert best - 1e-4 <= share <= 1.01 * best
    more = LowRank(rank, 8).split(weight, statistic.gram, prune)
    assert error(weight, more, statistic.gram) < 0.98 * error(weight, both, statistic.gram)


def test_what_is_dense_plus_low_rank_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    _, _, statistic = correlated_layer(64, 128, tokens=1024)
    sparse = torch.randn(64, 128, generator=generator)
    sparse += 2 * sparse.sign()  # so that none of those that are kept is small beside what is added
    keep = Target(NM(2, 4), 0.5).keep(sparse.abs(), "row")
    planted = Factors(torch.randn(64, 2, generator=generator), 0.1 * torch.randn(2, 128, generator=generator))
    weight = sparse.masked_fill(~keep, 0.0) + planted.product()

    def prune(rest: Tensor) -> Pruned:
        return METHODS["magnitude"].prune(rest, None, Target(NM(2, 4), 0.5))

    alone = error(weight, prune(weight), statistic.gram)
    assert error(weight, LowRank(2, 40).split(weight, statistic.gram, prune), statistic.gram) < 0.001 * alone


def test_directions_do_not_hang_on_chance() -> None:
    weight, _, statistic = correlated_layer(24, 32, tokens=256)
    first = leading_directions(weight, statistic.gram, 4)
    assert torch.equal(first, leading_directions(weight, statistic.gram, 4))
    assert torch.allclose(first.T @ first, torch.eye(first.shape[1]), atol=1e-5)


@pytest.mark.parametrize(("rank", "rounds"), [(0, 1), (1, 0)])
def test_nothing_to_add_is_refused(rank: int, rounds: int) -> None:
    with pytest.raises(BadInput):
        LowRank(rank, rounds)


def test_errors_beyond_float32_are_refused() -> None:
    weight, _, statistic = correlated_layer(130, 256, tokens=512)
    with pytest.raises(NumericalError, match="the error of the sparse part overflows"):
        leading_directions(weight, 1e38 * statistic.gram, 1)
