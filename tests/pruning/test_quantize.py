"""Values on a grid: scales, rounding against the formulas written plainly, exact masks, and bits counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.sample import InputSample
from coprune.model.walk.statistics import Gram
from coprune.pruning.methods import method_named
from coprune.pruning.methods.base import Pruned
from coprune.pruning.pruner import Solver
from coprune.pruning.quantize import rounded
from coprune.pruning.refine import refinement_named
from coprune.pruning.scales import fit_scales, stored_bits
from coprune.recipe.choice import Choice
from coprune.recipe.grid import Grid, Int4, Int8, grid_named
from coprune.recipe.pattern import NM, Target, Unstructured
from support.problems import correlated_layer

DENSE, HALF, TWO_OF_FOUR = Target(Unstructured(), 0.0), Target(Unstructured(), 0.5), Target(NM(2, 4), 0.5)


def with_grid(target: Target, grid: Grid) -> Target:
    return replace(target, grid=grid)


def inputs_of(statistic: Gram | None, x: Tensor) -> Inputs:
    sample = InputSample(x.shape[1], 1)
    sample.update(x)
    return Inputs(statistic, sample)


def on_grid(pruned: Pruned, grid: Grid) -> bool:
    """Whether every value is a whole number of its group's scale, within the codes that there are."""
    assert pruned.scales is not None
    rows, width = pruned.weight.shape
    codes = pruned.weight.reshape(rows, -1, grid.step(width)) / pruned.scales[:, :, None]
    inside = (codes >= -grid.half) & (codes <= grid.half - 1)
    return bool(inside.all()) and torch.equal(codes, codes.round())


def error_of(weight: Tensor, found: Tensor, statistic: Gram) -> float:
    delta = (weight - found).double()
    return float(((delta @ statistic.gram.double()) * delta).sum())


def test_values_that_lie_on_a_grid_keep_their_scale() -> None:
    codes = torch.tensor([[-8.0, 7, 0, 3, -2, 1], [5, -8, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).T
    scales = torch.tensor([0.5, -0.03125, 1.0])
    assert torch.equal(fit_scales(codes * scales, None, 8), scales)


@pytest.mark.parametrize("half", [8, 128])
def test_a_scale_is_better_than_that_of_the_largest_value_and_a_bfloat16_number(half: int) -> None:
    values = torch.randn(64, 30, generator=torch.Generator().manual_seed(0))
    cost = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    scales = fit_scales(values, cost, half)
    plain = values.abs().amax(dim=0) / (half - 1)

    def lost(by: Tensor) -> Tensor:
        return (((values / by).round().clamp(-half, half - 1) * by - values) ** 2 * cost[:, None]).sum(dim=0)

    assert lost(scales).sum() < {8: 0.85, 128: 0.99}[half] * lost(plain).sum()
    assert torch.equal(scales, scales.bfloat16().float())


def test_without_inputs_every_value_goes_to_the_nearest() -> None:
    weight = torch.tensor([[1.0, -8, 0, 2.4, 7, 0, 0, 3]])
    found = rounded(Pruned(weight, weight != 0), None, with_grid(HALF, Int4(4)))
    assert on_grid(found, Int4(4))
    assert torch.equal(found.weight == 0, weight == 0)
    assert (found.weight - weight).abs().max() <= found.scales.abs().max() / 2
    assert not torch.signbit(found.weight[found.weight == 0]).any()


def gptq(weight: Tensor, gram: Tensor, keep: Tensor, grid: Grid) -> Tensor:
    """GPTQ and OBR by their formula: with H of the weights that are still free, Δw = −e / (H⁻¹)_jj · (H⁻¹)_j."""
    weight, width = weight.double(), weight.shape[1]
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(width)
    for j in range(width):
        inverse = torch.linalg.inv(damped[j:, j:])
        if j % grid.step(width) == 0:
            ahead = slice(j, j + grid.step(width))
            # What is lost by changing weight j when all before it are fixed: e² / (H⁻¹)_jj.
            cost = torch.stack([1 / torch.linalg.inv(damped[k:, k:])[0, 0] for k in range(width)[ahead]])
            scales = fit_scales((weight * keep)[:, ahead].float().T.contiguous(), cost.float(), grid.half).double()
        becomes = (weight[:, j] / scales).round().clamp(-grid.half, grid.half - 1) * scales * keep[:, j]
        error = weight[:, j] - becomes
        weight[:, j:] -= error[:, None] / inverse[0, 0] * inverse[0]
        weight[:, j] = becomes
    return weight


@pytest.mark.parametrize("grid", [Int4(8), Int4(None), Int8()], ids=str)
def test_sparsegpt_without_zeros_is_gptq(grid: Grid) -> None:
    weight, _, statistic = correlated_layer(rows=6, width=32)
    found = method_named("sparsegpt", {"block_size": 16}).prune(weight, statistic, with_grid(DENSE, grid))
    expected = gptq(weight, statistic.gram, torch.ones_like(weight, dtype=torch.bool), grid)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-4, atol=1e-5)
    assert on_grid(found, grid)


@pytest.mark.parametrize("method", ["wanda", "alps", "admm"])
@pytest.mark.parametrize("target", [HALF, TWO_OF_FOUR], ids=str)
def test_a_mask_that_stands_is_rounded_by_the_formula(method: str, target: Target) -> None:
    weight, x, statistic = correlated_layer(rows=6, width=32)
    solver = Solver(method_named(method), rounds=True)
    assert solver.statistic is Gram
    before = solver.solve(weight, inputs_of(statistic, x), target)
    found = solver.solve(weight, inputs_of(statistic, x), with_grid(target, Int4(8)))
    assert torch.equal(found.keep, before.keep)
    assert not found.weight[~found.keep].any()
    assert on_grid(found, Int4(8))
    expected = gptq(before.weight, statistic.gram, before.keep, Int4(8))
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "ablate_wanda_iter", "ablate_mag_seq"])
@pytest.mark.parametrize("target", [HALF, TWO_OF_FOUR, DENSE], ids=str)
def test_rounding_by_columns_loses_less_than_rounding_each_value(method: str, target: Target) -> None:
    weight, x, statistic = correlated_layer(rows=40, width=128)
    solver, grid = Solver(method_named(method), rounds=True), Int4(32)
    plain = solver.solve(weight, inputs_of(statistic, x), target)
    nearest = rounded(plain, None, with_grid(target, grid))
    found = solver.solve(weight, inputs_of(statistic, x), with_grid(target, grid))
    assert on_grid(found, grid)
    assert not found.weight[~found.keep].any()
    assert int(found.keep.sum()) == int(plain.keep.sum())
    least = error_of(weight, plain.weight, statistic)
    lost, lost_by_nearest = (error_of(weight, one.weight, statistic) - least for one in (found, nearest))
    # The walk cannot know which of the later weights fall, where some do.
    assert lost < (0.5 if target is DENSE else 1) * lost_by_nearest


def test_zeros_that_a_model_has_stay_zeros_where_nothing_falls() -> None:
    weight, x, statistic = correlated_layer(rows=6, width=32)
    weight = weight.masked_fill(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5, 0.0)
    for method in ("sparsegpt", "wanda", "magnitude"):
        solver = Solver(method_named(method), rounds=True)
        found = solver.solve(weight, inputs_of(statistic, x), with_grid(DENSE, Int4(8)))
        assert not found.weight[weight == 0].any(), method


@pytest.mark.parametrize("method", ["admm", "alps", "sparsegpt", "wanda"])
@pytest.mark.parametrize("refined", [(), ("swaps",), ("refit",)], ids=str)
def test_where_nothing_falls_weights_are_as_they_are_to_the_last_bit(method: str, refined: tuple[str, ...]) -> None:
    weight, x, _ = correlated_layer(rows=6, width=32)
    weight = weight.masked_fill(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5, 0.0)
    x[:, :3] = 0
    statistic = Gram(32)
    statistic.update(x)
    solver = Solver(method_named(method), tuple(map(refinement_named, refined)))
    found = solver.solve(weight, inputs_of(statistic, x), DENSE)
    assert torch.equal(found.weight, weight)
    assert torch.equal(found.keep, weight != 0)


def test_a_refinement_comes_before_the_rounding() -> None:
    weight, x, statistic = correlated_layer()
    refit, grid = refinement_named("refit"), Int4(16)
    found = Solver(method_named("sparsegpt"), (refit,), rounds=True).solve(
        weight, inputs_of(statistic, x), with_grid(HALF, grid)
    )
    refitted = Solver(method_named("sparsegpt"), (refit,)).solve(weight, inputs_of(statistic, x), HALF)
    expected = rounded(refitted, statistic, with_grid(HALF, grid))
    assert torch.equal(found.weight, expected.weight)
    assert on_grid(found, grid)


def test_what_looks_at_no_inputs_is_rounded_without_them() -> None:
    weight, x, _ = correlated_layer()
    solver = Solver(method_named("magnitude"), rounds=True)
    assert solver.statistic is None
    found = solver.solve(weight, inputs_of(None, x), with_grid(HALF, Int8()))
    assert on_grid(found, Int8())
    # An expert that no token came to.
    unseen = Solver(method_named("sparsegpt"), rounds=True).solve(
        weight, inputs_of(Gram(weight.shape[1]), x), with_grid(HALF, Int8())
    )
    assert torch.equal(unseen.weight, found.weight)


def test_a_weight_of_an_input_that_was_never_seen_is_rounded_as_well() -> None:
    weight, x, _ = correlated_layer()
    x[:, 5] = 0
    statistic = Gram(64)
    statistic.update(x)
    kept = Pruned(weight, torch.ones_like(weight, dtype=torch.bool))
    found = rounded(kept, statistic, with_grid(DENSE, Int8()))
    torch.testing.assert_close(found.weight[:, 5], weight[:, 5], rtol=0, atol=0.02)


def test_bits_are_counted() -> None:
    weight = torch.ones(3, 16)
    weight[:, ::2] = 0
    scales = 3 * 2 * 16
    # Of 48 weights 24 are left: all at 4 bits; or 48 bits of mask, three starts and 24 values.
    assert stored_bits(weight, with_grid(HALF, Int4(8))) == min(48 * 4, 48 + 3 * 32 + 24 * 4) + scales
    assert stored_bits(torch.ones(3, 16), with_grid(DENSE, Int4(8))) == 48 * 4 + scales
    weight[:, 2:] = 0
    assert stored_bits(weight, with_grid(HALF, Int4(8))) == 48 + 3 * 32 + 3 * 4 + scales
    # Two of every four, with two bits for the place of each; the scale is one for a row.
    assert stored_bits(torch.ones(2, 64), with_grid(TWO_OF_FOUR, Int8())) == 2 * 64 // 2 * (8 + 2) + 2 * 16


def test_grids_are_named() -> None:
    assert grid_named(Choice.of("int8")) == Int8()
    assert grid_named(Choice.of({"name": "int4", "group": 32})) == Int4(32)
    assert str(grid_named(Choice.of("int4"))) == "int4:group=64"
    assert [str(grid_named(Choice.of(name))) for name in ("int8", "int4:group=null")] == ["int8", "int4:group=null"]
    for wrong in ("int5", "int4:bits=3", "int4:group=0", "int4:group=many"):
        with pytest.raises(BadInput):
            grid_named(Choice.of(wrong))
    weight, _, statistic = correlated_layer()
    with pytest.raises(BadInput, match="do not divide a width of 64"):
        method_named("sparsegpt").prune(weight, statistic, with_grid(HALF, Int4(24)))
    with pytest.raises(BadInput, match="cut through the pattern's groups of 4; take quantize='int4:group=4'"):
        method_named("sparsegpt").prune(weight, statistic, with_grid(TWO_OF_FOUR, Int4(2)))
