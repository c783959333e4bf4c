"""Keep the zeros of a pruned model in any training: a plain loop, transformers' Trainer, TRL.

`keep_zeros` works with any torch optimiser, created at any time: it masks gradients as they are accumulated and sets pruned
weights to zero again after every step. `hold_zeros` does so for coprune's own optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from transformers import TrainerCallback

from coprune.base.environment import asks_for_fsdp, rank
from coprune.base.errors import BadInput, BrokenMask
from coprune.base.progress import Reporter
from coprune.base.words import per_cent
from coprune.model.edits import pruned_names
from coprune.training.masks import Masks, find_masks, plain_parameters


def keep_zeros(model: nn.Module, *, quiet: bool = False) -> ZeroKeeper:
    """Keep every zero of a pruned model, and its N:M pattern, while any torch optimiser trains it.

    This takes effect immediately. The result is a context manager that verifies and releases the zeros at its end, and a
    callback for transformers' Trainer and its subclasses that verifies them at every save and at the end of training.

    Args:
        model: the pruned model in memory; its zeros are the mask.
        quiet: print no messages on standard error.

    Returns:
        The object that keeps the zeros until its `release`.

    Raises:
        BadInput: the model is dense or not in memory, or FSDP would shard its parameters.
    """
    if not isinstance(model, nn.Module):
        named = f"keep_zeros takes a model in memory, and {str(model)!r:.80} is a {type(model).__name__}"
        raise BadInput(named, field="model", fix="load it first, as with AutoModelForCausalLM.from_pretrained")
    if asks_for_fsdp():
        fix = "use data parallel processes: torchrun, or accelerate without FSDP"
        raise BadInput("zeros cannot be kept with FSDP", fix=fix)
    return ZeroKeeper(model, find_masks(model, named=_pruned_before(model)), Reporter(quiet))


class _Mask:
    """Mask of a parameter's kept entries. It has no reference to the parameter, whose hook holds it, to avoid a cycle."""

    def __init__(self, keep: Tensor) -> None:
        self._keep = keep

    @torch.no_grad()
    def hold(self, tensor: Tensor) -> None:
        """Set pruned entries to zero, on the tensor's device."""
        self._keep = self._keep.to(tensor.device)
        tensor.mul_(self._keep)

    def hold_gradient(self, parameter: Tensor) -> None:
        """Mask the gradient that a parameter has accumulated."""
        if parameter.grad is not None:
            self.hold(parameter.grad)


# The masks of each parameter, for the parameter's lifetime.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups if _kept else ():
        for parameter in group["params"]:
            for mask in _kept.get(parameter, ()):
                mask.hold(parameter)


# Applies to all optimisers, including those created later.
register_optimizer_step_post_hook(_after_step)


class ZeroKeeper(TrainerCallback):
    """Callback that keeps a model's zeros, created by `coprune.keep_zeros`. It stays active without references to it."""

    def __init__(self, model: nn.Module, masks: Masks, reporter: Reporter) -> None:
        self.masks = masks
        self._reporter = reporter
        self._parameters = plain_parameters(model)
        self._said = -1
        self._held: list[tuple[nn.Parameter, _Mask, RemovableHandle]] = []
        for name, pruned in masks.pruned.items():
            parameter, mask = self._parameters[name], _Mask(~pruned)
            _kept.setdefault(parameter, []).append(mask)
            self._held.append((parameter, mask, _hook(parameter, mask.hold_gradient)))

    def line(self) -> str:
        """Return a message about the kept zeros."""
        patterns = ", ".join(f"{count} × {name}" for name, count in self.masks.patterns.items())
        return f"Every zero kept: {per_cent(self.masks.sparsity)} of {len(self.masks.matrices)} matrices ({patterns})."

    def verify(self) -> None:
        """Raise BrokenMask, naming the first matrix, if a pruned weight is not zero or an N:M pattern is violated."""
        try:
            self.masks.verify(self._parameters)
        except BrokenMask as error:
            cause = "they were changed by something other than a torch optimiser"
            raise BrokenMask(error.cause, fix=cause) from None

    def release(self) -> None:
        """Stop keeping the zeros."""
        for parameter, mask, hook in self._held:
            hook.remove()
            _kept[parameter].remove(mask)
        self._held.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.release()
        if kind is None:
            self._tell()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise BadInput if the trainer's model is not the one whose zeros are kept."""
        trained = plain_parameters(kwargs["model"])
        if any(trained.get(name) is not self._parameters[name] for name in self.masks.pruned):
            fix = "use trainer.add_callback(coprune.keep_zeros(trainer.model))"
            raise BadInput("the trainer's model is not the one whose zeros are kept", fix=fix)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Verify and report the zeros."""
        self._said = state.global_step
        self._tell()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Verify the zeros at the end, unless they were just saved."""
        if self._said != state.global_step:
            self._tell()

    def _tell(self) -> None:
        self.verify()
        if rank() == 0:
            self._reporter.say(self.line())


def _hook(parameter: nn.Parameter, mask: Any) -> RemovableHandle:
    """Mask a gradient when it is accumulated; of a frozen parameter, once it is unfrozen."""
    trained = parameter.requires_grad
    handle: RemovableHandle = parameter.requires_grad_(True).register_post_accumulate_grad_hook(mask)
    parameter.requires_grad_(trained)
    return handle


def _pruned_before(model: nn.Module) -> set[str]:
    """Return the names of pruned matrices recorded in the model's folder, if it has one."""
    folder = str(getattr(model, "name_or_path", ""))
    return pruned_names(Path(folder)) if folder and Path(folder).is_dir() else set()


_WEIGHT_BY_WEIGHT = (Adam, AdamW, SGD)
"""Optimisers that leave a zero weight with zero gradients and moments at zero."""


def hold_zeros(model: nn.Module, optimizer: Optimizer, masks: Masks) -> None:
    """Make an optimiser keep every pruned weight of a model at zero, for the lifetime of both.

    model: holds the optimiser's parameters, possibly wrapped or sharded; masks: of the unwrapped model.
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
    """Whether the gradient was masked since the last step. Hooks miss gradients that are not accumulated, and those of a
    parameter swapped by a device conversion (`torch.__future__.set_swap_module_params_on_conversion`)."""
    clean: bool | None = None
    """Whether the optimiser keeps pruned weights zero by itself: its state there is zero and stays so with masked gradients.
    None if not checked yet; a resumed training may restore a nonzero state."""

    def mask_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.mul_(self.keep)
            self.masked = True

    def after_step(self, state: Mapping[str, Any]) -> None:
        """Restore zeros after a step. state: of the optimiser, for this parameter."""
        if self.clean is None:
            moments = [one for one in state.values() if isinstance(one, Tensor) and one.shape == self.keep.shape]
            keep = _own(self.keep)
            self.clean = not any(bool(_own(one).masked_fill(keep, 0).any()) for one in moments)
        self.masked = False
        if not self.clean:
            # Faster than masked_fill. Weights that are not finite stay so, and the next save fails.
            self.parameter.mul_(self.keep)


def _own(whole: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the tensor if it is not sharded."""
    return whole.to_local() if isinstance(whole, DTensor) else whole


def _like(keep: Tensor, parameter: nn.Parameter) -> Tensor:
    """Move a mask to its parameter's device, with the parameter's sharding."""
    if isinstance(parameter, DTensor):
        # Every process holds the whole mask, so no communication is needed.
        return distribute_tensor(
            keep.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return keep.to(parameter.device)
