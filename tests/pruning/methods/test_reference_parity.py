"""The Wanda repository's methods against plain versions of the published procedures (`published.py`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coprune.model.walk.statistics import Gram, InputNorm
from coprune.pruning.methods import METHODS, method_named
from coprune.recipe.pattern import NM, Target
from support.problems import TARGETS, correlated_layer
from support.published import below_global_threshold, published_column_update, published_magnitude, published_wanda

pruned_of = {"2:4": (2, 4), "4:8": (4, 8), "unstructured": (0, 0)}


@pytest.fixture(scope="module", params=[0, 1])
def layer(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Gram]:
    return correlated_layer(rows=20, width=304, tokens=1024, seed=request.param)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_magnitude_matches_the_published_procedure(layer: tuple[Tensor, Tensor, Gram], target: Target) -> None:
    weight, _, _ = layer
    pruned = METHODS["magnitude"].prune(weight, None, target)
    dropped = published_magnitude(weight, 0.5, *pruned_of[str(target.pattern)])
    assert torch.equal(~pruned.keep, dropped)
    assert torch.equal(pruned.weight, weight.masked_fill(dropped, 0))


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", ["wanda", "wanda_variant"])
def test_wanda_and_its_variant_match_the_published_procedure(
    layer: tuple[Tensor, Tensor, Gram], target: Target, name: str
) -> None:
    weight, x, _ = layer
    statistic = InputNorm(x.shape[1])
    for batch in x.split(100):
        statistic.update(batch)
    pruned = METHODS[name].prune(weight, statistic, target)
    mean_square = x.square().mean(dim=0)
    dropped = published_wanda(weight, mean_square, 0.5, *pruned_of[str(target.pattern)], use_variant="variant" in name)
    assert torch.equal(~pruned.keep, dropped)
    assert torch.equal(pruned.weight, weight.masked_fill(dropped, 0))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_sparsegpt_matches_the_published_formula_in_any_group(
    layer: tuple[Tensor, Tensor, Gram], target: Target
) -> None:
    weight, _, statistic = layer
    pruned = METHODS["sparsegpt"].prune(weight, statistic, target)
    expected, dropped = published_column_update(
        weight, statistic.gram, lambda w, d, _: w**2 / d.reshape(1, -1) ** 2, 0.5, *pruned_of[str(target.pattern)]
    )
    assert torch.equal(~pruned.keep, dropped)
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", ["ablate_mag_seq", "ablate_wanda_seq", "ablate_mag_iter", "ablate_wanda_iter"])
def test_ablations_match_the_authors_procedures(layer: tuple[Tensor, Tensor, Gram], target: Target, name: str) -> None:
    weight, _, statistic = layer
    square = statistic.mean_square
    counts = pruned_of[str(target.pattern)]
    fixed = None
    if name == "ablate_mag_seq":
        fixed = published_magnitude(weight, 0.5, *counts)
    elif name == "ablate_wanda_seq":
        fixed = published_wanda(weight, square, 0.5, *counts)

    def metric(w: Tensor, _: Tensor, columns: slice) -> Tensor:
        return w.abs() * square[columns].sqrt() if "wanda" in name else w.abs()

    pruned = METHODS[name].prune(weight, statistic, target)
    expected, dropped = published_column_update(weight, statistic.gram, metric, 0.5, *counts, fixed=fixed)
    assert torch.equal(~pruned.keep, dropped)
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=1e-3, atol=1e-4)


def test_the_published_threshold_prunes_one_more(layer: tuple[Tensor, Tensor, Gram]) -> None:
    weight, _, _ = layer
    published = weight.abs() <= weight.abs().flatten().sort().values[int(weight.numel() * 0.5)]
    keep = METHODS["magnitude"].prune(weight, None, TARGETS[0]).keep
    assert int((published == keep).sum()) == 1


def test_a_block_prunes_its_own_share(layer: tuple[Tensor, Tensor, Gram]) -> None:
    weight, _, statistic = layer
    keep = method_named("sparsegpt", {"block_size": 96}).prune(weight, statistic, TARGETS[0]).keep
    for block in keep.split(96, dim=1):
        assert int((~block).sum()) == block.numel() // 2


def test_wanda_may_compare_weights_over_the_whole_matrix(layer: tuple[Tensor, Tensor, Gram]) -> None:
    weight, x, statistic = layer
    keep = method_named("wanda", {"group": "matrix"}).prune(weight, statistic, TARGETS[0]).keep
    assert torch.equal(~keep, below_global_threshold(weight.abs() * x.square().mean(dim=0).sqrt(), 0.5))


def test_dead_inputs_are_pruned_and_leave_the_rest_alone() -> None:
    weight, x, statistic = correlated_layer(width=32)
    wide_x = torch.cat([x[:, :16], torch.zeros(len(x), 16), x[:, 16:]], dim=1)
    wide = torch.cat([weight[:, :16], torch.ones(24, 16), weight[:, 16:]], dim=1)
    wide_statistic = type(statistic)(48)
    wide_statistic.update(wide_x)
    target = TARGETS[1]
    got = METHODS["sparsegpt"].prune(wide, wide_statistic, target)
    expected = METHODS["sparsegpt"].prune(weight, statistic, target)
    assert not got.weight[:, 16:32].any()
    live = torch.cat([got.weight[:, :16], got.weight[:, 32:]], dim=1)
    torch.testing.assert_close(live, expected.weight, rtol=1e-3, atol=1e-4)


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    weight, x, statistic = correlated_layer(width=64)
    small = type(statistic)(64)
    small.update(x * 1e-4)
    for target in TARGETS:
        one, other = (METHODS["sparsegpt"].prune(weight, s, target) for s in (statistic, small))
        assert torch.equal(one.keep, other.keep)
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-4)


def test_nm_groups_are_chosen_within_the_strip_of_a_wide_group() -> None:
    weight, _, statistic = correlated_layer(width=128)
    target = type(TARGETS[0])(NM(16, 64), 0.75)
    pruned = METHODS["sparsegpt"].prune(weight, statistic, target)
    expected, dropped = published_column_update(
        weight, statistic.gram, lambda w, d, _: w**2 / d.reshape(1, -1) ** 2, 0.75, 48, 64
    )
    assert torch.equal(~pruned.keep, dropped)
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=1e-3, atol=1e-4)
