"""Properties of every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError
from coprune.base.selection import count_pruned
from coprune.model.walk.statistics import Gram, InputNorm
from coprune.pruning.methods import METHODS, method_named
from coprune.pruning.methods.sparsegpt import SparseGPT
from coprune.recipe.pattern import NM, Target, Unstructured
from support.problems import correlated_layer


@st.composite
def targets(draw: st.DrawFn) -> Target:
    if draw(st.booleans()):
        return Target(Unstructured(), draw(st.floats(0, 0.95)))
    pattern = draw(st.sampled_from([NM(1, 2), NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 4), NM(5, 8), NM(2, 16)]))
    return Target(pattern, pattern.sparsity)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=12, deadline=None)
@given(target=targets(), seed=st.integers(0, 1000), rows=st.integers(1, 12), groups=st.integers(1, 5))
def test_every_method_gives_the_exact_sparsity_and_true_zeros(
    name: str, target: Target, seed: int, rows: int, groups: int
) -> None:
    weight, _, statistic = correlated_layer(rows, 16 * groups, tokens=64, seed=seed)
    before = weight.clone()
    pruned = method_named(name).prune(weight, statistic, target)
    assert torch.equal(weight, before)
    assert pruned.weight.shape == weight.shape
    assert pruned.weight.dtype == torch.float32
    assert pruned.keep.dtype == torch.bool
    assert torch.equal(pruned.weight == 0, ~pruned.keep)
    if isinstance(target.pattern, NM):
        kept = pruned.keep.reshape(rows, -1, target.pattern.m).sum(dim=2)
        assert bool((kept == target.pattern.n).all())
    elif name == "wanda_variant":
        reached = float((~pruned.keep).float().mean())
        assert bool(pruned.events) == (abs(reached - target.sparsity) > 0.001)
    else:
        zeros = int((~pruned.keep).sum())
        by_row = rows * count_pruned(weight.shape[1], target.sparsity)
        by_matrix = count_pruned(weight.numel(), target.sparsity)
        assert zeros in (by_row, by_matrix)


@pytest.mark.parametrize("name", METHODS)
def test_a_width_that_m_does_not_divide_is_refused(name: str) -> None:
    weight, _, statistic = correlated_layer(4, 18)
    with pytest.raises(BadInput, match="2:4"):
        METHODS[name].prune(weight, statistic, Target(NM(2, 4), 0.5))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sparsgpt", {}, "did you mean 'sparsegpt'"),
        ("sparsegpt", {"blocksize": 64}, "did you mean 'block_size'"),
        ("sparsegpt", {"block_size": "64"}, "integer"),
        ("sparsegpt", {"block_size": True}, "integer"),
        ("sparsegpt", {"block_size": 0}, "positive"),
        ("sparsegpt", {"damping": -0.1}, "positive"),
        ("sparsegpt", {"damping": float("nan")}, "positive"),
        ("wanda", {"group": "column"}, "'row' or 'matrix'"),
        ("wanda_variant", {"alpha": 0.4}, "no options"),
    ],
)
def test_bad_names_and_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        method_named(name, options)


def test_valid_method_options_are_accepted() -> None:
    assert method_named("sparsegpt", {"damping": 1, "block_size": 64}) == SparseGPT(block_size=64, damping=1)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_wanda_variant_reaches_the_sparsity_if_all_scores_are_zero(sparsity: float) -> None:
    weight, _, _ = correlated_layer(6, 40)
    silent = InputNorm(40)
    silent.update(torch.zeros(16, 40))
    target = Target(Unstructured(), sparsity)
    pruned = METHODS["wanda_variant"].prune(weight, silent, target)
    assert int((~pruned.keep).sum()) == 6 * count_pruned(40, sparsity)
    assert torch.equal(pruned.weight, weight * pruned.keep)
    assert not pruned.events
    # Rows of zeros are pruned like the others and do not affect them.
    _, x, _ = correlated_layer(6, 40)
    heard = InputNorm(40)
    heard.update(x)
    weight[:2] = 0
    pruned = METHODS["wanda_variant"].prune(weight, heard, target)
    assert (~pruned.keep[:2]).sum(dim=1).tolist() == [count_pruned(40, sparsity)] * 2
    assert float((~pruned.keep[2:]).float().mean()) == pytest.approx(sparsity, abs=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_nan_weights_are_refused(name: str) -> None:
    weight, _, statistic = correlated_layer(4, 16)
    weight[1, 3] = float("nan")
    with pytest.raises(NumericalError):
        METHODS[name].prune(weight, statistic, Target(Unstructured(), 0.5))


def test_matrices_share_the_factor_until_the_statistic_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, statistic = correlated_layer(4, 16)
    target = Target(Unstructured(), 0.5)
    made = []
    whole = Gram.__dict__["gram"].fget

    def counted(self: Gram) -> Tensor:
        made.append(1)
        return whole(self)

    monkeypatch.setattr(Gram, "gram", property(counted))
    first = METHODS["sparsegpt"].prune(weight, statistic, target)
    METHODS["ablate_mag_seq"].prune(weight, statistic, target)
    assert len(made) == 1
    statistic.update(torch.randn(100, 16))
    second = METHODS["sparsegpt"].prune(weight, statistic, target)
    assert len(made) == 2
    assert not torch.equal(first.weight, second.weight)
    fresh = Gram(16)
    fresh.update(x)
    statistic.merge(fresh)
    METHODS["sparsegpt"].prune(weight, statistic, target)
    assert len(made) == 3
