"""Keep pruned weights at zero while any optimiser trains the others.

Gradients are masked as they are accumulated, before they are averaged over processes, clipped or seen by the
optimiser: so its state is zero wherever a weight is pruned. And after every step the pruned weights are set to zero
once more, for optimisers whose update is not weight by weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from coprune.finetune.masks import Masks, plain_parameters


def hold_zeros(model: nn.Module, optimizer: Optimizer, masks: Masks) -> None:
    """Let an optimiser leave every pruned weight of a model at zero, for as long as both live.

    model: the parameters that the optimiser has, wrapped or sharded as they may be; masks: of the plain model.
    """
    held: list[tuple[nn.Parameter, Tensor]] = []
    for name, parameter in plain_parameters(model).items():
        if name in masks.pruned and parameter.requires_grad:
            pruned = _like(masks.pruned[name], parameter)
            parameter.register_post_accumulate_grad_hook(_masked_gradient(pruned))  # type: ignore[no-untyped-call]
            held.append((parameter, pruned))

    @torch.no_grad()
    def after_step(*_: object) -> None:
        for parameter, pruned in held:
            parameter.masked_fill_(pruned, 0)

    optimizer.register_step_post_hook(after_step)


def _masked_gradient(pruned: Tensor) -> Callable[[Tensor], None]:
    def mask(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(pruned, 0)

    return mask


def _like(pruned: Tensor, parameter: nn.Parameter) -> Tensor:
    """A mask where its parameter is, sharded alike."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(pruned.to(parameter.device), parameter.device_mesh, parameter.placements)
    return pruned.to(parameter.device)
