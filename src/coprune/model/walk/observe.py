"""Observe the products themselves: see what every tracked matrix is about to be multiplied with.

A `TorchFunctionMode` sees each `linear`, `addmm`, `matmul` … of a running block. An argument that starts where a
tracked matrix starts in memory is that matrix, and the other argument is its input. No hook per class, no family code,
and every single expert of a mixture is seen with exactly the tokens routed to it. It acts before the product runs, so
a matrix may be pruned in the very moment in which it is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coprune.base.errors import UnsupportedModel
from coprune.base.words import Set
from coprune.model.matrices import Matrix

# Each product: position of the input and of the weight among the arguments, and the weight's input dimension.
_PRODUCTS: dict[Callable[..., Any], tuple[int, int, int]] = {
    F.linear: (0, 1, 1),
    torch.matmul: (0, 1, 0),
    torch.Tensor.matmul: (0, 1, 0),
    torch.Tensor.__matmul__: (0, 1, 0),
    torch.mm: (0, 1, 0),
    torch.Tensor.mm: (0, 1, 0),
    torch.addmm: (1, 2, 0),
    torch.Tensor.addmm: (1, 2, 0),
    F.conv2d: (0, 1, 1),
}
_KEYWORDS = {
    F.linear: ("input", "weight"),
    torch.addmm: ("mat1", "mat2"),
    torch.matmul: ("input", "other"),
    F.conv2d: ("input", "weight"),
}

Result = TypeVar("Result")
OnProduct = Callable[[Matrix, Tensor], None]


class Observe(TorchFunctionMode):
    """While active, call `on_product(matrix, input)` just before a tracked matrix is multiplied.

    Raises UnsupportedModel if a matrix is used the other way round than it is stored.
    """

    def __init__(self, matrices: Iterable[Matrix], on_product: OnProduct) -> None:
        super().__init__()
        self._on_product = on_product
        self._tracked = {_address(m.stored()): m for m in matrices}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        positions = _PRODUCTS.get(func)
        if positions is not None:
            self._see(func, positions, args, kwargs)
        return func(*args, **kwargs)

    def _see(self, func: Any, positions: tuple[int, int, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = _KEYWORDS.get(func, ("", ""))
        x = args[positions[0]] if len(args) > positions[0] else kwargs.get(names[0])
        weight = args[positions[1]] if len(args) > positions[1] else kwargs.get(names[1])
        if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.ndim == (4 if func is F.conv2d else 2)):
            return
        matrix = self._tracked.get(_address(weight))
        if matrix is None:
            return
        if func is F.conv2d:
            x, weight = patches(x, matrix.owner), weight.flatten(1)
        stored = matrix.stored()
        if weight.numel() != stored.numel():
            return  # a part of the matrix; if the whole is never seen, the walk says so
        as_stored = weight.shape == stored.shape and weight.stride() == stored.stride()
        input_dim = positions[2] if as_stored else 1 - positions[2]
        if input_dim != matrix.input_dim:
            raise UnsupportedModel(
                f"{matrix.name} is multiplied along its outputs",
                fix=("leave it out with ", Set("exclude", matrix.name)),
            )
        self._on_product(matrix, x)


@dataclass
class Products:
    """Which matrices were multiplied while a block ran."""

    groups: list[list[Matrix]] = field(default_factory=list)
    """In order of first use; those of one group are fed by the same tensor."""
    reused: list[Matrix] = field(default_factory=list)
    """Once for every use after the first."""
    unseen: list[Matrix] = field(default_factory=list)


def observe_products(matrices: Sequence[Matrix], run: Callable[[], Result]) -> tuple[Result, Products]:
    """Call `run`, which runs a block, and note which matrices share an input, are reused, or never appear."""
    products = Products()
    inputs: list[Tensor] = []  # held until the block is done: the address of a freed tensor comes back as another's
    seen: set[str] = set()

    def on_product(matrix: Matrix, x: Tensor) -> None:
        if matrix.name in seen:
            products.reused.append(matrix)
            return
        seen.add(matrix.name)
        for known, group in zip(inputs, products.groups, strict=True):
            if known is x:
                group.append(matrix)
                return
        inputs.append(x)
        products.groups.append([matrix])

    with Observe(matrices, on_product):
        result = run()
    products.unseen = [matrix for matrix in matrices if matrix.name not in seen]
    return result, products


def patches(x: Tensor, convolution: nn.Module) -> Tensor:
    """What a convolution without overlaps multiplies its weight with, position by position.

    x: B × C × H × W (or without B). Returns … × positions × (C · kernel height · kernel width).
    """
    assert isinstance(convolution, nn.Conv2d)
    height, width = convolution.stride
    if tuple(convolution.kernel_size) == (1, 1):
        return x[..., ::height, ::width].flatten(-2).transpose(-1, -2)
    return F.unfold(x, (height, width), stride=(height, width)).transpose(-1, -2)


def _address(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.data_ptr()
