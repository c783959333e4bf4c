"""Outputs that matter more to the model keep more weights: their gradients, and their use in methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import coprune
from coprune.model.walk.statistics import Gram
from coprune.pruning.allocation import allocation_named
from coprune.pruning.allocation.allocation_plan import plan_targets
from coprune.pruning.allocation.fisher import shares_of_outputs
from coprune.pruning.methods import METHODS
from coprune.pruning.methods.base import prune_by_outputs
from coprune.pruning.methods.sparsegpt import inverse_factor_of
from coprune.recipe.pattern import NM, Target, Unstructured
from support.gradients import gradients_of_each
from support.pico import pico_model, pico_tokens
from support.walking import make_walk

TARGET = Target(Unstructured(), 0.6)


def matrix_and_inputs() -> tuple[torch.Tensor, Gram]:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(8, 32, generator=generator), torch.randn(200, 32, generator=generator)
    statistic = Gram(32)
    statistic.update(inputs)
    return weight, statistic


@pytest.mark.parametrize(("family", "said", "power"), [("llama", "", 0.5), ("mixtral", ":outputs=1", 1.0)])
def test_outputs_are_weighted_by_their_squared_gradients(family: str, said: str, power: float) -> None:
    model, tokens = pico_model(family), pico_tokens(6, 16)
    walk = make_walk(model, tokens.split(2))
    targets = plan_targets(allocation_named(f"fisher{said}"), walk.model, walk.recording, TARGET)
    expected: dict[str, torch.Tensor] = {}
    for _ in gradients_of_each(model, tokens.split(1)):
        for matrix in walk.model.chosen.all():
            squares = matrix.gradient().double().square().sum(dim=1)
            expected[matrix.name] = expected.get(matrix.name, torch.zeros_like(squares)) + squares
    assert targets.keys() == expected.keys()
    for name, target in targets.items():
        assert target.outputs is not None
        assert target.outputs == pytest.approx(shares_of_outputs(expected[name], power), rel=1e-3)
    recording = make_walk(model, tokens.split(2)).recording
    plain = plan_targets(allocation_named("fisher:outputs=0"), walk.model, recording, TARGET)
    assert all(own.outputs is None and own == targets[name] for name, own in plain.items())
    groups = Target(NM(2, 4), 0.5)
    recording = make_walk(model, tokens.split(2)).recording
    grouped = plan_targets(allocation_named(f"fisher{said}"), walk.model, recording, groups)
    assert all(own.outputs is None for own in grouped.values())


def test_shares_of_outputs_average_one_and_are_clipped() -> None:
    far = torch.tensor([1.0, 3.0, 0.0, 1e9], dtype=torch.float64)
    for power, most in ((1.0, 4 * 256), (0.5, 32)):
        shares = shares_of_outputs(far, power)
        assert float(shares.mean()) == pytest.approx(1.0)
        assert (shares / shares[0]).tolist() == pytest.approx([1, 1, 1, most])
    assert shares_of_outputs(torch.tensor([1.0, 3.0], dtype=torch.float64), 1.0).tolist() == [0.5, 1.5]
    shares = shares_of_outputs(torch.tensor([1.0, 9.0], dtype=torch.float64), 0.5)
    assert shares.tolist() == pytest.approx([0.5, 1.5])
    assert shares_of_outputs(torch.zeros(3, dtype=torch.float64), 0.5).tolist() == [1.0, 1.0, 1.0]


def test_scores_are_scaled_by_the_outputs_weight() -> None:
    weight, statistic = matrix_and_inputs()
    outputs = torch.tensor([3.0, 1.0, 0.3, 1.2, 16.0, 0.9, 0.07, 1.1])
    target = replace(TARGET, outputs=outputs)
    factor = inverse_factor_of(statistic, 0.01)
    score = (weight / factor.pivots).square() * outputs[:, None]
    found = prune_by_outputs(METHODS["sparsegpt"], weight, statistic, target)
    assert torch.equal(found.keep, TARGET.keep(score))
    assert found.keep.sum(dim=1)[4] > found.keep.sum(dim=1)[6]
    # A row with the same mask gets the same weights as without output weights.
    same = prune_by_outputs(METHODS["sparsegpt"], weight[4:5], statistic, replace(TARGET, outputs=outputs[4:5]))
    assert torch.equal(same.weight, METHODS["sparsegpt"].prune(weight[4:5], statistic, TARGET).weight)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "alps"])
def test_methods_without_updates_keep_weights_to_the_last_bit(method: str) -> None:
    weight, statistic = matrix_and_inputs()
    outputs = torch.linspace(0.3, 9.0, 8)
    found = prune_by_outputs(METHODS[method], weight, statistic, replace(TARGET, outputs=outputs))
    plain = METHODS[method].prune(weight, statistic, TARGET)
    assert bool((found.weight[~found.keep] == 0).all())
    assert int(found.keep.sum()) == int(plain.keep.sum())
    if method != "alps":
        assert torch.equal(found.weight[found.keep], weight[found.keep])
    assert torch.equal(found.keep, plain.keep) == (method == "wanda")


def test_fisher_outputs_change_zeros_per_output_at_the_same_sparsity() -> None:
    said: dict[str, Any] = {"dataset": pico_tokens(8, 32), "sparsity": 0.6, "method": "sparsegpt", "refine": ("refit",)}
    models = [pico_model("llama") for _ in range(2)]
    for model, allocation in zip(models, ["fisher:outputs=0", "fisher"], strict=True):
        report = coprune.prune(model, allocation=allocation, evaluate=False, quiet=True, **said).report
        assert report.sparsity.matrices == pytest.approx(0.6, abs=2e-3)
    zeros = [(model.model.layers[0].mlp.gate_proj.weight == 0).sum(dim=1) for model in models]
    assert int(zeros[0].sum()) == pytest.approx(int(zeros[1].sum()), rel=0.01)
    assert int(zeros[1].max() - zeros[1].min()) > int(zeros[0].max() - zeros[0].min())
