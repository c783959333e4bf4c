"""Weights beyond the range of the model's dtype are refused, and the matrix stays unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coprune.base.errors import NumericalError
from coprune.model.matrices import Matrix
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.model.walk.statistics import Gram
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver, prune_matrix
from coprune.recipe.pattern import Target, parse_pattern


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "alps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_weights_beyond_float16_are_refused(method: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(16, 8, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_((6e4 * torch.randn(8, 16, generator=generator)).clamp(-65504, 65504))
    matrix = Matrix("large", linear, "weight", input_dim=1)
    dense = matrix.read().clone()
    # Correlated inputs, so that kept weights grow to compensate for pruned ones.
    x = torch.randn(64, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    inputs = Inputs(Gram(16, x.device), InputSample(16, 1))
    inputs.update(x)
    target = Target(parse_pattern("2:4"), 0.5)
    if dtype == torch.float16:
        with pytest.raises(NumericalError, match="large: pruned weights are too large for float16"):
            prune_matrix(matrix, inputs, Solver(METHODS[method]), target, True)
        assert torch.equal(matrix.read(), dense)
    else:
        assert prune_matrix(matrix, inputs, Solver(METHODS[method]), target, True).sparsity == 0.5
        assert bool(torch.isfinite(matrix.read()).all())
