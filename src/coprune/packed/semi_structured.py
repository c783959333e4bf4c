"""PyTorch's semi-structured (2:4) weights on NVIDIA GPUs from compute capability 8.0.

Not measured: it was written without such a GPU. `bench` and `accelerate` measure before anything is converted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coprune.base.devices import capability

DTYPES = (torch.float16, torch.bfloat16)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether every four consecutive inputs of an O × I weight keep at most two."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).view(weight.shape[0], -1, 4).sum(dim=2) <= 2).all())


def can_convert(linear: nn.Linear) -> bool:
    """Whether PyTorch has a semi-structured product for this layer: GPU, dtype, pattern and a shape that it takes."""
    weight = linear.weight
    if capability(weight.device) < (8, 0) or weight.dtype not in DTYPES:
        return False
    if weight.shape[0] % 32 or weight.shape[1] % 64:
        return False
    return is_two_of_four(weight)


def semi_structured_linear(linear: nn.Linear) -> nn.Linear:
    """A copy of the layer with a semi-structured weight (can_convert must hold). For inference only."""
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
    copy.weight = nn.Parameter(weight, requires_grad=False)
    copy.bias = linear.bias
    return copy.train(linear.training)
