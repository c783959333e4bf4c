"""Each allocation against a plain version of the paper's formula."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.model.blocks import Block
from coprune.model.matrix_choice import Chosen
from coprune.pruning.allocation import allocation_named
from coprune.pruning.allocation.allocation import unit_name, units_of
from coprune.pruning.allocation.allocation_plan import plan_targets
from coprune.pruning.allocation.fisher import convex_curve
from coprune.pruning.allocation.owl import kept_by_outliers
from coprune.recipe.pattern import Target, Unstructured
from coprune.recipe.recipe import make_recipe
from coprune.stages.checks import check_allocation
from support.pico import pico_model, pico_tokens
from support.walking import inputs_by_full_forwards, layers_of, make_walk, prove

BATCHES = pico_tokens(16, 32).split(8)


def plan(model: PreTrainedModel, allocation: str, target: Target) -> tuple[dict[str, Target], Sequence[Block], Chosen]:
    walk = make_walk(model, BATCHES)
    targets = plan_targets(allocation_named(allocation), walk.model, walk.recording, target)
    return targets, walk.model.blocks, walk.model.chosen


def test_owl_keeps_more_where_there_are_more_outliers() -> None:
    model = pico_model("llama")
    with torch.no_grad():  # blocks with different numbers of outliers
        model.model.layers[1].mlp.gate_proj.weight[0, :40] *= 60
        model.model.layers[2].mlp.up_proj.weight[:3] *= 60
    targets, blocks, _ = plan(model, "owl", Target(Unstructured(), 0.7))
    shares = []
    for block in blocks:
        layers = layers_of(block)
        inputs = inputs_by_full_forwards(model, layers, BATCHES)
        metric = torch.cat([(layer.weight.abs() * inputs[layer.name].norm(dim=0)).reshape(-1) for layer in layers])
        shares.append(float((metric > 5 * metric.mean()).float().mean()))
    # All blocks have one size, so the authors' mean over blocks is the mean over weights.
    ratio = (np.array(shares) - min(shares)) / (max(shares) - min(shares)) * 0.16
    expected = 1 - (ratio - ratio.mean() + 0.3)
    for block, sparsity in zip(blocks, expected, strict=True):
        own = [t.sparsity for name, t in targets.items() if name.startswith(f"{block.name}.")]
        assert own == pytest.approx([sparsity] * len(own), abs=1 / 64)


def test_shares_of_kept_weights_are_weighted_by_size() -> None:
    shares = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    counts = torch.tensor([100.0, 300.0, 50.0], dtype=torch.float64)
    kept = kept_by_outliers(shares, counts, 0.3, 0.08)
    assert float((kept * counts).sum() / counts.sum()) == pytest.approx(0.3)
    assert float(kept.max() - kept.min()) == pytest.approx(0.16)
    assert float(kept[2]) == pytest.approx(float(kept[0] + kept[1]) / 2)
    assert kept_by_outliers(torch.ones(3), counts, 0.3, 0.08).tolist() == pytest.approx([0.3] * 3)


def test_curves_are_the_convex_hull_from_below() -> None:
    curve = convex_curve(np.array([0.4, 0.5, 0.6, 0.7]), np.array([0.1, 0.3, 0.3, 0.7]))
    assert curve.cost(np.array([0.4, 0.5, 0.6, 0.65, 0.7])) == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.7])
    assert (curve.low, curve.high) == (0.4, 0.7)


def test_experts_of_one_parameter_are_one_unit() -> None:
    model = pico_model("mixtral")
    walk = make_walk(model, BATCHES)
    units = units_of(walk.model.chosen, walk.model.names)
    experts = next(unit for unit in units if unit.name == "model.layers.0.mlp.experts.down_proj")
    assert len(experts.members) == 4
    assert (experts.rows, experts.width, experts.place) == (4 * 64, 96, "model.layers.0")
    assert {unit_name(name) for name in experts.members} == {experts.name}


def test_planning_an_allocation_leaves_the_model_unchanged() -> None:
    model, dense = pico_model("llama"), pico_model("llama")
    for name in ("owl", "fisher"):
        plan(model, name, Target(Unstructured(), 0.5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("name", ["owl", "fisher"])
def test_unreachable_sparsities_are_refused_before_any_measurement(name: str) -> None:
    model = prove(pico_model("llama"), BATCHES[0])
    recipe = make_recipe({"model": "pico", "allocation": name, "sparsity": 0.999})
    with pytest.raises(BadInput, match="no room"):
        check_allocation(recipe, model, Target(Unstructured(), 0.999))
    check_allocation(recipe.replaced(sparsity=0.5), model, Target(Unstructured(), 0.5))
