"""SparseGPT rounds kept weights to the source's grid, and later columns compensate for the rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coprune.model.checkpoint.formats.grids import Bytes, Floats4, Floats8, Grid, Integers
from coprune.model.checkpoint.formats.weight import CODES, SCALES, Form, Weight
from coprune.model.walk.statistics import Gram
from coprune.pruning.methods.base import prune_by_outputs
from coprune.pruning.methods.sparsegpt import SparseGPT
from coprune.recipe.pattern import Target, parse_pattern

OUT, IN, TOKENS, GROUP = 24, 64, 512, 32


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("grid", [Floats8(), Floats4(), Integers(4)])
def test_rounding_during_pruning_costs_less_than_afterwards(grid: Grid, pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(IN, IN, generator=generator) * IN**-0.5
    inputs = torch.randn(TOKENS, IN, generator=generator) @ mixed
    statistic = Gram(IN)
    statistic.update(inputs)
    form = Weight("weight", Form("of the test", grid, Bytes(torch.uint8)), OUT, IN, (1, GROUP))
    scales = 0.01 + 0.01 * torch.rand(OUT, IN // GROUP, generator=generator)
    stored = {CODES: torch.randint(1, 16, (OUT, IN), generator=generator, dtype=torch.uint8), SCALES: scales}
    weight = form.decode(stored, torch.empty(OUT, IN))

    def error(found: Tensor) -> float:
        return float((inputs @ (found - weight).T).norm())

    outputs = 0.5 + torch.rand(OUT, generator=generator)  # rows with larger weights, which a method sees scaled
    target = Target(parse_pattern(pattern), 0.5, outputs=outputs)
    free = prune_by_outputs(SparseGPT(), weight, statistic, target).weight
    afterwards = form.decode(form.encode(free, stored)[0], torch.empty(OUT, IN))
    inside = prune_by_outputs(SparseGPT(), weight, statistic, replace(target, grid=form.grid(stored)))
    parts, rounding = form.encode(inside.weight, stored)
    assert rounding.values == 0
    torch.testing.assert_close(form.decode(parts, torch.empty(OUT, IN)), inside.weight)
    assert torch.equal(inside.weight != 0, inside.keep)
    assert error(inside.weight) < 1.01 * error(afterwards)  # which costs hardly anything in eight bits
