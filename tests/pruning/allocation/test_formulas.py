"""Each allocation's formula against the paper's, written plainly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.model.blocks import Block
from coprune.model.choosing import Chosen
from coprune.model.walk.recording import record_batches
from coprune.pruning.allocation import allocation_named
from coprune.pruning.allocation.alpha import sparsities_by_exponent, tail_exponent
from coprune.pruning.allocation.base import unit_name, units_of
from coprune.pruning.allocation.curves import convex_curve
from coprune.pruning.allocation.error import layer_errors
from coprune.pruning.allocation.owl import kept_by_outliers
from coprune.pruning.allocation.plan import movement, plan_targets
from coprune.recipe.pattern import NM, Target, Unstructured
from coprune.recipe.recipe import make_recipe
from coprune.run.checks import check_allocation
from support.pico import pico_model, pico_tokens
from support.problems import correlated_layer
from support.walking import inputs_by_full_forwards, layers_of, make_walk, prove

BATCHES = pico_tokens(16, 32).split(8)


def plan(model: PreTrainedModel, allocation: str, target: Target) -> tuple[dict[str, Target], Sequence[Block], Chosen]:
    walk = make_walk(model, BATCHES)
    targets = plan_targets(allocation_named(allocation), walk.model, walk.recording, target)
    return targets, walk.model.blocks, walk.model.chosen


def test_owl_keeps_more_where_there_are_more_outliers() -> None:
    model = pico_model("llama")
    with torch.no_grad():  # some blocks with outliers, in different numbers
        model.model.layers[1].mlp.gate_proj.weight[0, :40] *= 60
        model.model.layers[2].mlp.up_proj.weight[:3] *= 60
    targets, blocks, _ = plan(model, "owl", Target(Unstructured(), 0.7))
    shares = []
    for block in blocks:
        layers = layers_of(block)
        inputs = inputs_by_full_forwards(model, layers, BATCHES)
        metric = torch.cat([(layer.weight.abs() * inputs[layer.name].norm(dim=0)).reshape(-1) for layer in layers])
        shares.append(float((metric > 5 * metric.mean()).float().mean()))
    # All blocks are of one size, so the authors' mean over blocks is the mean over weights.
    ratio = (np.array(shares) - min(shares)) / (max(shares) - min(shares)) * 0.16
    expected = 1 - (ratio - ratio.mean() + 0.3)
    for block, sparsity in zip(blocks, expected, strict=True):
        own = [t.sparsity for name, t in targets.items() if name.startswith(f"{block.name}.")]
        assert own == pytest.approx([sparsity] * len(own), abs=1 / 64)


def test_shares_of_kept_weights_are_weighed_by_size() -> None:
    shares = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    counts = torch.tensor([100.0, 300.0, 50.0], dtype=torch.float64)
    kept = kept_by_outliers(shares, counts, 0.3, 0.08)
    assert float((kept * counts).sum() / counts.sum()) == pytest.approx(0.3)
    assert float(kept.max() - kept.min()) == pytest.approx(0.16)
    assert float(kept[2]) == pytest.approx(float(kept[0] + kept[1]) / 2)
    assert kept_by_outliers(torch.ones(3), counts, 0.3, 0.08).tolist() == pytest.approx([0.3] * 3)


def test_the_tail_exponent_is_hills_estimate_over_the_larger_half() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 64, generator=generator)
    values = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
    tail = values[len(values) // 2 :]
    expected = 1 + len(tail) / np.sum(np.log(tail / tail[0]))
    assert tail_exponent(weight) == pytest.approx(expected, rel=1e-6)
    assert tail_exponent(weight.T) == pytest.approx(expected, rel=1e-6)
    assert tail_exponent(3 * weight) == pytest.approx(expected, rel=1e-6)


def test_a_heavier_tail_has_a_smaller_exponent_and_is_pruned_less() -> None:
    values = torch.arange(1, 33, dtype=torch.float64)
    heavy, light = torch.diag(values**-2).float(), torch.diag(values**-0.5).float()
    assert tail_exponent(heavy) < tail_exponent(light)
    exponents = torch.tensor([tail_exponent(heavy), tail_exponent(light)], dtype=torch.float64)
    sparsities = sparsities_by_exponent(exponents, torch.tensor([1.0, 1.0], dtype=torch.float64), 0.5, 0.3)
    assert sparsities.tolist() == pytest.approx([0.35, 0.65])


def test_what_scaling_would_lift_above_all_weights_goes_to_the_others() -> None:
    exponents = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    counts = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    sparsities = sparsities_by_exponent(exponents, counts, 0.85, 0.3)
    # 0.7 and 1.0 times a scale that the first two have in common, and all of the third.
    assert sparsities.tolist() == pytest.approx([0.7 * 1.55 / 1.7, 1.55 / 1.7, 1.0])


@pytest.mark.parametrize("target", [Target(Unstructured(), 0.6), Target(NM(2, 4), 0.5)])
def test_layer_errors_are_those_of_wandas_mask(target: Target) -> None:
    weight, x, statistic = correlated_layer()
    size, error = layer_errors(weight, statistic, [target], refit=0)
    score = weight.abs() * x.square().mean(dim=0).sqrt()
    pruned = weight.masked_fill(~target.keep(score, "row"), 0)
    assert float(size) == pytest.approx(float((x @ weight.T).square().sum()) / len(x), rel=1e-4)
    assert float(error) == pytest.approx(float((x @ (weight - pruned).T).square().sum()) / len(x), rel=1e-3)
    _, refitted = layer_errors(weight, statistic, [target], refit=10)
    assert float(refitted) < 0.9 * float(error)


def test_curves_are_the_convex_hull_from_below() -> None:
    curve = convex_curve(np.array([0.4, 0.5, 0.6, 0.7]), np.array([0.1, 0.3, 0.3, 0.7]))
    assert curve.cost(np.array([0.4, 0.5, 0.6, 0.65, 0.7])) == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.7])
    assert (curve.low, curve.high) == (0.4, 0.7)


def test_error_spends_where_least_is_lost() -> None:
    """Of two matrices, the one whose channels are worth little loses less and is pruned more."""
    model = pico_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 8:] *= 0.001
    targets, _, _ = plan(model, "error", Target(Unstructured(), 0.6))
    assert targets["model.layers.1.self_attn.o_proj"].sparsity >= 0.74
    assert targets["model.layers.1.self_attn.o_proj"].sparsity > targets["model.layers.0.self_attn.o_proj"].sparsity


def test_error_beats_uniform_in_summed_relative_error() -> None:
    model = pico_model("llama")
    target = Target(Unstructured(), 0.6)
    targets, blocks, _ = plan(model, "error:rows=1000,movement=0.0", target)
    total = {"uniform": 0.0, "error": 0.0}
    for block in blocks:
        layers = layers_of(block)
        inputs = inputs_by_full_forwards(model, layers, BATCHES)
        for layer in layers:
            x, weight = inputs[layer.name], layer.weight
            score = weight.abs() * x.norm(dim=0)
            for name, own in (("uniform", target), ("error", targets[layer.name])):
                lost = weight.masked_fill(own.keep(score, "row"), 0)
                total[name] += float((x @ lost.T).square().sum() / (x @ weight.T).square().sum())
    assert total["error"] < total["uniform"]


def test_errors_count_by_what_their_block_changes() -> None:
    """In a block that hardly adds anything to the hidden states, zeros cost little."""
    model = pico_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight *= 0.01
        model.model.layers[1].mlp.down_proj.weight *= 0.01

    def mean_sparsity(allocation: str) -> float:
        targets, _, _ = plan(model, allocation, Target(Unstructured(), 0.6))
        return float(np.mean([t.sparsity for name, t in targets.items() if ".layers.1." in name]))

    assert mean_sparsity("error") >= 0.74
    assert abs(mean_sparsity("error:movement=0.0") - 0.6) < 0.05


def test_movement_is_relative_and_by_token() -> None:
    before = torch.tensor([[3.0, 4.0], [1000.0, 0.0]])
    after = torch.tensor([[3.0, 0.0], [1000.0, 0.0]])
    assert movement(before, after) == pytest.approx((16 / 9 + 0) / 2)
    assert movement(None, None) == movement(before, after[:1]) == 1.0


def test_experts_of_one_parameter_are_one_unit() -> None:
    model = pico_model("mixtral")
    walk = make_walk(model, BATCHES)
    units = units_of(walk.model.chosen, walk.model.names)
    experts = next(unit for unit in units if unit.name == "model.layers.0.mlp.experts.down_proj")
    assert len(experts.members) == 4
    assert (experts.rows, experts.width, experts.place) == (4 * 64, 96, "model.layers.0")
    assert {unit_name(name) for name in experts.members} == {experts.name}


def test_a_plan_looks_only() -> None:
    model, dense = pico_model("llama"), pico_model("llama")
    for name in ("owl", "alpha", "error", "fisher"):
        plan(model, name, Target(Unstructured(), 0.5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("name", ["alpha", "owl", "error", "fisher", "search:rounds=3,step=0.0005"])
def test_what_no_allocation_can_reach_is_refused_before_any_look(name: str) -> None:
    model = prove(pico_model("llama"), BATCHES[0])
    recipe = make_recipe({"model": "pico", "allocation": name, "sparsity": 0.999})
    with pytest.raises(BadInput, match="no room"):
        check_allocation(recipe, model, Target(Unstructured(), 0.999))
    check_allocation(recipe.replaced(sparsity=0.5), model, Target(Unstructured(), 0.5))


def test_alpha_needs_no_data() -> None:
    model = pico_model("llama")
    proven = prove(model, BATCHES[0])
    target = Target(Unstructured(), 0.5)
    without = plan_targets(allocation_named("alpha"), proven, None, target)
    recording = record_batches(proven, BATCHES)
    assert without == plan_targets(allocation_named("alpha"), proven, recording, target)
    assert len({t.sparsity for t in without.values()}) > 1
