"""Learning rates in proportion to what is trained: one rate for all is a large step for small weights.

Matrices of Gemma 3 are a fifth and a tenth of the size of SmolLM2's; a rate that mends one harms the other.
"""

from __future__ import annotations

import torch

from coprune.pruning.refine.trained import sizes_of


def rates_by_size(optimizer: torch.optim.Optimizer) -> None:
    """Multiply the rate of every matrix and vector with its root mean square, zeros left out; 1 where all of it is zero.

    Every parameter becomes a group of its own. A training that is resumed takes the rates from its state.
    """
    each = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    sizes = sizes_of((parameter, parameter != 0) for _, parameter in each)
    optimizer.param_groups.clear()
    for (group, parameter), size in zip(each, sizes, strict=True):
        optimizer.add_param_group({**group, "params": [parameter], "lr": group["lr"] * size})
