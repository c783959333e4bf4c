"""Keep pruned weights at zero while any optimiser trains the others.

Gradients are masked as they are accumulated, before they are averaged over processes, clipped or seen by the
optimiser: so its state is zero wherever a weight is pruned, and one that changes each weight by its own state alone leaves
it at zero. Behind any other one the pruned weights are set to zero once more after every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    held: list[_Held] = []
    by_itself = type(optimizer) in _WEIGHT_BY_WEIGHT
    for name, parameter in plain_parameters(model).items():
        if name in masks.pruned and parameter.requires_grad:
            keep = _like(~masks.pruned[name], parameter)
            held.append(_Held(parameter, keep, clean=None if by_itself else False))
            parameter.register_post_accumulate_grad_hook(held[-1].mask_gradient)

    @torch.no_grad()
    def before_step(*_: object) -> None:
        for one in held:
            if not one.masked:
                one.mask_gradient(one.parameter)

    @torch.no_grad()
    def after_step(*_: object) -> None:
        for one in held:
            one.after_step(optimizer.state.get(one.parameter, {}))

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


@dataclass
class _Held:
    """A parameter whose pruned weights stay zero."""

    parameter: nn.Parameter
    keep: Tensor
    masked: bool = False
    """Whether its gradient was, since the last step. No hook sees one that is not accumulated, or that is of a parameter which a
    module's conversion has swapped (`torch.__future__.set_swap_module_params_on_conversion`), as it does on some devices."""
    clean: bool | None = None
    """Whether the optimiser keeps pruned weights zero by itself: its state is zero there, and stays so behind masked gradients.
    None: not looked at yet, since a training that goes on may bring a state with it."""

    def mask_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.mul_(self.keep)
            self.masked = True

    def after_step(self, state: Mapping[str, Any]) -> None:
        """state: the optimiser's of the parameter."""
        if self.clean is None:
            moments = [one for one in state.values() if isinstance(one, Tensor) and one.shape == self.keep.shape]
            keep = _own(self.keep)
            self.clean = not any(bool(_own(one).masked_fill(keep, 0).any()) for one in moments)
        self.masked = False
        if not self.clean:
            # Faster than to fill by the mask. A weight that is not finite stays so and fails the next save.
            self.parameter.mul_(self.keep)


def _own(whole: Tensor) -> Tensor:
    """This process's shard of a tensor; what is not sharded is all its own."""
    return whole.to_local() if isinstance(whole, DTensor) else whole


def _like(keep: Tensor, parameter: nn.Parameter) -> Tensor:
    """A mask where its parameter is, sharded alike."""
    if isinstance(parameter, DTensor):
        # Every process derived the whole mask from the same zeros: it cuts its shard out without hearing the others.
        return distribute_tensor(
            keep.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return keep.to(parameter.device)
