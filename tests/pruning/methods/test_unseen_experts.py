"""Experts to which nothing but zeros came, though they saw every token: of layers that run all of them, times zero."""

from __future__ import annotations

import pytest
import torch

from coprune.model.walk.inputs import Inputs
from coprune.model.walk.sample import InputSample
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver
from coprune.recipe.pattern import NM, Target


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_they_are_pruned_by_magnitude(method: str) -> None:
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
    assert found.events == ("no calibration token came to it, so it was pruned by magnitude",)
