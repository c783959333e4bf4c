"""Learning rates in proportion to what is trained: one rate for all is a large step for small weights.

Matrices of Gemma 3 are a fifth and a tenth of the size of SmolLM2's; a rate that mends one harms the other. And a few
gains of its norms are a hundred times larger than the others, so that a step in proportion to all of them is long for most.
"""

from __future__ import annotations

import torch

from coprune.pruning.refine.trained import sizes_of


def rates_by_size(optimizer: torch.optim.Optimizer) -> None:
    """Multiply the rate of every matrix with its root mean square, of every vector with its median size.

    Zeros are left out; where all of a parameter is zero, its rate stays. Every parameter becomes a group of its own. A training
    that is resumed takes the rates from its state.
    """
    each = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    sizes = sizes_of((parameter, parameter != 0) for _, parameter in each)
    optimizer.param_groups.clear()
    for (group, parameter), size in zip(each, sizes, strict=True):
        rate = group["lr"] * (_median(parameter) or size)
        optimizer.add_param_group({**group, "params": [parameter], "lr": rate})


def _median(parameter: torch.Tensor) -> float | None:
    """Median size of a vector's entries that are not zero; None of a matrix, or where there are none."""
    if parameter.ndim > 1:
        return None
    there = parameter.detach()[parameter != 0].abs()
    return float(there.median()) if len(there) else None
