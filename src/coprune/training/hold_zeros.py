"""Keep pruned weights at zero while any optimiser trains the others.

Gradients are masked as they are accumulated, before they are averaged over processes, clipped or seen by the
optimiser: so its state is zero wherever a weight is pruned, and one that changes each weight by its own state alone leaves
it at zero. Behind any other one the pruned weights are set to zero once more after every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from coprune.training.masks import Masks, plain_parameters

_WEIGHT_BY_WEIGHT = (Adam, AdamW, SGD)
"""With gradients and moments of zero their update is zero, and so is the decay of a weight that is."""


def hold_zeros(model: nn.Module, optimizer: Optimizer, masks: Masks) -> None:
    """Let an optimiser leave every pruned weight of a model at zero, for as long as both live.

    model: the parameters that the optimiser has, wrapped or sharded as they may be; masks: of the plain model.
    """
    held: list[tuple[nn.Parameter, Tensor]] = []
    for name, parameter in plain_parameters(model).items():
        if name in masks.pruned and parameter.requires_grad:
            keep = _like(~masks.pruned[name], parameter)
            parameter.register_post_accumulate_grad_hook(_masked_gradient(keep))
            held.append((parameter, keep))

    @torch.no_grad()
    def after_step(*_: object) -> None:
        for parameter, keep in held:
            # Faster than to fill by the mask. A weight that is not finite stays so and fails the next save.
            parameter.mul_(keep)

    if type(optimizer) not in _WEIGHT_BY_WEIGHT:
        optimizer.register_step_post_hook(after_step)


def _masked_gradient(keep: Tensor) -> Callable[[Tensor], None]:
    def mask(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.mul_(keep)

    return mask


def _like(keep: Tensor, parameter: nn.Parameter) -> Tensor:
    """A mask where its parameter is, sharded alike."""
    if isinstance(parameter, DTensor):
        # Every process derived the whole mask from the same zeros: it cuts its shard out without hearing the others.
        return distribute_tensor(
            keep.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return keep.to(parameter.device)
