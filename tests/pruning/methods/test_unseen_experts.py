"""Experts and other matrices that only saw zeros, and unseen inputs."""

from __future__ import annotations

import pytest
import torch

from coprune.model.walk.inputs import Inputs, InputSample
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver
from coprune.pruning.solver_events import Event
from coprune.recipe.pattern import NM, Target, parse_pattern


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_experts_that_see_every_token_times_zero_are_pruned_by_magnitude(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, target = torch.randn(8, 16, generator=generator), Target(NM(2, 4), 0.5)
    solver = Solver(METHODS[method])
    assert solver.statistic is not None
    own, pool = solver.statistic(16), solver.statistic(16)
    own.update(torch.zeros(64, 16))
    pool.update(torch.randn(64, 16, generator=generator))
    found = solver.solve(weight, Inputs(own, InputSample(16, 1), pool=pool), target)
    expected = METHODS["magnitude"].prune(weight, None, target)
    assert torch.equal(found.weight, expected.weight)
    assert found.events == (Event(kind="no tokens"),)


@pytest.mark.parametrize("method", ["wanda", "ria", "dsnot", "sparsegpt", "admm", "alps"])
def test_a_matrix_without_inputs_is_pruned_by_magnitude(method: str) -> None:
    """It is not zeroed completely, and the pattern is kept."""
    generator = torch.Generator().manual_seed(0)
    weight, target = torch.randn(8, 16, generator=generator), Target(NM(2, 4), 0.5)
    solver = Solver(METHODS[method])
    assert solver.statistic is not None
    inputs = Inputs(solver.statistic(16), InputSample(16, 1))
    inputs.update(torch.zeros(64, 16))
    found = solver.solve(weight, inputs, target)
    assert torch.allclose(found.weight[found.keep], weight[found.keep], atol=1e-5)
    assert (found.weight == 0).view(8, 4, 4).sum(dim=2).eq(2).all()
    if method != "ria":  # it scores by shares of row and column
        assert torch.equal(found.keep, METHODS["magnitude"].prune(weight, None, target).keep)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "alps"])
def test_without_pruning_unseen_inputs_keep_their_weights(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, generator=generator).sign() + 1.5
    weight[0] = 0.0
    solver = Solver(METHODS[method])
    assert solver.statistic is not None
    inputs = Inputs(solver.statistic(16), InputSample(16, 1))
    inputs.update(torch.randn(64, 16, generator=generator).index_fill(1, torch.arange(5), 0.0))
    found = solver.solve(weight, inputs, Target(parse_pattern("unstructured"), 0.0))
    assert torch.equal(found.weight == 0, weight == 0)
    assert torch.allclose(found.weight[:, :5], weight[:, :5], rtol=0.02)
