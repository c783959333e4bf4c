"""Observe products by the memory of their weights, for weights outside layers' forwards, such as experts.

For the oracle only, and independent of the tested code: everything happens in forwards of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_RIGHT = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}


@dataclass
class Part:
    """A matrix in a parameter, and all its inputs."""

    name: str
    """Name of the parameter; for a stack of matrices with the number in brackets."""
    stored: Tensor
    """Rows × columns, a view."""
    inputs_are_columns: bool
    x: Tensor
    """T × I"""

    @property
    def weight(self) -> Tensor:
        """O × I, a view."""
        return self.stored if self.inputs_are_columns else self.stored.T


class _Watch(TorchFunctionMode):
    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): (name, p) for name, p in parameters.items()}
        self.seen: dict[str, tuple[Tensor, bool, list[Tensor]]] = {}
        self.stacks: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.linear and len(args) > 1:
            self._note(args[1], args[0], in_columns=True)
        elif func in _RIGHT:
            self._note(args[1], args[0], in_columns=False)
            self._note(args[0], args[1].mT if args[1].ndim > 1 else args[1], in_columns=True)
        elif func is torch.einsum:
            self._note_sum(*args)
        return func(*args, **(kwargs or {}))

    def _note_sum(self, equation: str, *operands: Tensor) -> None:
        """Record products written as in XLNet: `ibh,hnd->ibnd` and `ibnd,hnd->ibh`."""
        for known, inputs_are_columns in (("ibh,hnd->ibnd", False), ("ibnd,hnd->ibh", True)):
            if equation == known and operands[1].untyped_storage().data_ptr() in self._names:
                name, parameter = self._names[operands[1].untyped_storage().data_ptr()]
                x = operands[0].flatten(2).reshape(-1, operands[0][0, 0].numel())
                self.seen.setdefault(name, (parameter.view(len(parameter), -1), inputs_are_columns, []))[2].append(
                    x.clone()
                )

    def _note(self, weight: Tensor, x: Tensor, in_columns: bool) -> None:
        """Record a product. in_columns: whether the operand's columns are its inputs."""
        found = self._names.get(weight.untyped_storage().data_ptr())
        if found is None or weight.ndim < 2:
            return
        name, parameter = found
        if weight.ndim == 4 and weight.shape[1] == 1:  # one matrix of a stack for all samples of a batch
            weight = weight.squeeze(1)
        stack = _stack_of(name, parameter, weight)
        whole_table = len(stack) == 1 and stack is not parameter and not name.endswith(".weight")
        if weight.shape[-1] * weight.shape[-2] != stack[0].numel() or whole_table:
            return
        self.stacks[name] = stack
        in_columns = in_columns == (weight.stride(-1) == 1)
        first = (weight.storage_offset() - parameter.storage_offset()) // stack[0].numel()
        for position, matrix in enumerate(weight if weight.ndim == 3 else [weight]):
            label = f"{name}[{first + position}]" if stack is parameter or len(stack) > 1 else name
            rows = x[position] if weight.ndim == 3 else x
            stored = stack[first + position]
            assert matrix.numel() == stored.numel()
            _, known, xs = self.seen.setdefault(label, (stored, in_columns, []))
            assert known == in_columns, label
            xs.append(rows.reshape(-1, rows.shape[-1]).float().clone())


def _stack_of(name: str, parameter: nn.Parameter, weight: Tensor) -> Tensor:
    """Return the matrices of a parameter that `weight` views; a table outside layers is split into equal numbers of rows."""
    if parameter.ndim == 3:
        return parameter
    of_a_layer = name.endswith(".weight") or parameter.numel() % weight.numel()
    return parameter[None] if of_a_layer else parameter.unflatten(0, (parameter.numel() // weight.numel(), -1))


@torch.no_grad()
def watch_products(parameters: Mapping[str, nn.Parameter], run: Callable[[], object]) -> list[Part]:
    """Return every matrix of the parameters that `run` multiplies, with all its inputs.

    If one matrix of a stack is multiplied, the others are returned without inputs.
    """
    watch = _Watch(parameters)
    with watch:
        run()
    found = {
        name: Part(name, stored.detach(), in_columns, torch.cat(xs))
        for name, (stored, in_columns, xs) in watch.seen.items()
    }
    for part in list(found.values()):
        stack = part.name.partition("[")[0]
        for number, stored in enumerate(watch.stacks[stack].detach() if "[" in part.name else []):
            width = stored.shape[1 if part.inputs_are_columns else 0]
            other = Part(f"{stack}[{number}]", stored, part.inputs_are_columns, torch.empty(0, width))
            found.setdefault(other.name, other)
    return list(found.values())
