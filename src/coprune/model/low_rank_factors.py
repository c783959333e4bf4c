"""Factors of low rank that are added to the products of pruned matrices, beside the weights and not in them.

A layer that may get one is wrapped before anything is pruned, since a matrix may be pruned in the middle of its layer's own
forward. From then on everybody who runs the model sees the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coprune.model.matrices import Matrix
from coprune.model.transformers_private import Conv1D


class Factors(NamedTuple):
    """A matrix of low rank as a product: `up` @ `down`, with up O × R and down R × I."""

    up: Tensor
    down: Tensor

    def product(self) -> Tensor:
        """Return the product, O × I."""
        return self.up @ self.down

    def stored_as(self, dtype: torch.dtype) -> Factors:
        """Return the factors rounded to a dtype, in float32."""
        return Factors(*(factor.to(dtype).to(torch.float32).contiguous() for factor in self))


class WithFactors:
    """A layer's forward with the product of factors added, once there are some: as PEFT computes it, in float32."""

    def __init__(self, layer: nn.Module) -> None:
        self.forward = layer.forward
        self.factors: Factors | None = None
        self.silent = False
        """Whether it does without them for the moment."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        answer: Tensor = self.forward(*args, **kwargs)
        # Checked after the product, in which the layer's matrix may have been pruned.
        if self.factors is None or self.silent:
            return answer
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        up, down = self.factors
        return (answer + F.linear(F.linear(x.to(down.dtype), down), up)).to(answer.dtype)


def may_get_factors(matrix: Matrix) -> bool:
    """Return whether a matrix is the whole weight of a linear layer, as PEFT's LoRA requires."""
    return matrix.expert is None and isinstance(matrix.owner, nn.Linear | Conv1D)


def wrap(matrix: Matrix) -> WithFactors:
    """Make a layer add factors once it has some; a wrapped layer is unchanged."""
    wrapped = wrapped_of(matrix.owner)
    if wrapped is None:
        wrapped = matrix.owner.forward = WithFactors(matrix.owner)
    return wrapped


def wrapped_of(layer: nn.Module) -> WithFactors | None:
    """Return the wrapper that adds factors to a layer's output, if there is one."""
    forward = layer.__dict__.get("forward")
    return forward if isinstance(forward, WithFactors) else None


def factors_below(module: nn.Module, prefix: str = "") -> dict[str, Factors]:
    """Return all factors below a module, by the names of their layers. prefix: the module's own path."""
    found = {}
    for path, layer in module.named_modules():
        wrapped = wrapped_of(layer)
        if wrapped is not None and wrapped.factors is not None:
            found[".".join(part for part in (prefix, path) if part)] = wrapped.factors
    return found


def give(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Add factors to layers, by name."""
    for name, own in factors.items():
        layer = model.get_submodule(name)
        weight: Tensor = layer.get_parameter("weight")
        there = own if weight.is_meta else Factors(*(factor.to(weight.device) for factor in own))
        wrap(Matrix(name, layer, "weight", input_dim=1)).factors = there


def take_away(model: nn.Module) -> dict[str, Factors]:
    """Unwrap every layer and return the factors."""
    found = factors_below(model)
    for layer in model.modules():
        wrapped = wrapped_of(layer)
        if wrapped is not None:
            del layer.forward
            if getattr(wrapped.forward, "__func__", None) is not type(layer).forward:
                layer.forward = wrapped.forward
    return found


@contextmanager
def without_factors(model: nn.Module) -> Iterator[None]:
    """Compute without factors in the body."""
    wrapped = [own for layer in model.modules() if (own := wrapped_of(layer)) is not None]
    for own in wrapped:
        own.silent = True
    try:
        yield
    finally:
        for own in wrapped:
            own.silent = False


@contextmanager
def noting_calls(matrices: Iterable[Matrix]) -> Iterator[set[str]]:
    """Record in the body which matrices' layers are called.

    A weight that a model multiplies by without its layer would miss the layer's factors.
    """
    called: set[str] = set()

    def watch(matrix: Matrix) -> Any:
        return matrix.owner.register_forward_pre_hook(lambda *_: called.add(matrix.name))

    handles = [watch(matrix) for matrix in matrices]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def stored_factors(factors: Mapping[str, Factors], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return factors as tensors of a file, with names as PEFT's end. dtype: of the model."""
    found = {}
    for name, own in factors.items():
        found[f"{name}.lora_A.weight"] = own.down.to(dtype)
        found[f"{name}.lora_B.weight"] = own.up.to(dtype)
    return found


def factors_stored(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Factors]:
    """Read what `stored_factors` made. Raises KeyError where one is missing."""

    def read(name: str) -> Tensor:
        return tensors[name].to(torch.float32)

    return {name: Factors(read(f"{name}.lora_B.weight"), read(f"{name}.lora_A.weight")) for name in names}
