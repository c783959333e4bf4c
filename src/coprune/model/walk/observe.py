"""Observe products: the input of every tracked matrix, just before it is multiplied.

A `TorchFunctionMode` sees each `linear`, `addmm`, `matmul` … of a running block. An argument at a tracked matrix's address is
that matrix, and the other argument is its input. This needs no hooks per class and no code per family, sees each expert with
its own tokens, and lets a matrix be pruned just before its first use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coprune.base.errors import UnsupportedModel
from coprune.base.words import Set
from coprune.model.checkpoint.deferred import address_of
from coprune.model.matrices import Matrix

PRODUCTS: dict[Callable[..., Any], tuple[int, int, int]] = {
    F.linear: (0, 1, 1),
    torch.matmul: (0, 1, 0),
    torch.Tensor.matmul: (0, 1, 0),
    torch.Tensor.__matmul__: (0, 1, 0),
    torch.mm: (0, 1, 0),
    torch.Tensor.mm: (0, 1, 0),
    torch.addmm: (1, 2, 0),
    torch.Tensor.addmm: (1, 2, 0),
    F.conv2d: (0, 1, 1),
    torch.bmm: (0, 1, 0),
    torch.Tensor.bmm: (0, 1, 0),
}
"""Each product: position of the input and of the weight among the arguments, and the weight's input dimension."""
_KEYWORDS = {
    F.linear: ("input", "weight"),
    torch.addmm: ("mat1", "mat2"),
    torch.matmul: ("input", "other"),
    F.conv2d: ("input", "weight"),
}

Result = TypeVar("Result")
_Address = tuple[torch.device, int]
OnProduct = Callable[[Matrix, Tensor], None]


def refuse_backwards(matrix: Matrix) -> None:
    """Raise UnsupportedModel for a matrix that is used transposed."""
    raise UnsupportedModel(
        f"{matrix.name} is multiplied along its outputs", fix=("leave it out with ", Set("exclude", matrix.name))
    )


class Observe(TorchFunctionMode):
    """While active, calls `on_product(matrix, input)` just before a tracked matrix is multiplied.

    The experts of a mixture may be multiplied one by one, or all at once as a batch of matrices.
    """

    def __init__(
        self,
        matrices: Iterable[Matrix],
        on_product: OnProduct,
        on_backwards: Callable[[Matrix], None] = refuse_backwards,
        hear: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Observe products with matrices.

        on_backwards: called for a matrix that is used transposed; hear: called with the other operand of any weight.
        """
        super().__init__()
        self._on_product = on_product
        self._on_backwards = on_backwards
        self._hear = hear
        self._tracked: dict[_Address, Matrix] = {}
        self._stacks: dict[_Address, list[Matrix]] = {}
        for matrix in matrices:
            self._tracked[_address(matrix.stored())] = matrix
            if matrix.expert is not None:
                self._stacks.setdefault(_address(getattr(matrix.owner, matrix.attribute)), []).append(matrix)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        positions = PRODUCTS.get(func)
        if positions is not None:
            self._see(func, positions, args, kwargs)
        elif func is torch.einsum and len(args) == 3:
            self._see_sum(*args)
        return func(*args, **kwargs)

    def _see(self, func: Any, positions: tuple[int, int, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = _KEYWORDS.get(func, ("", ""))
        x = args[positions[0]] if len(args) > positions[0] else kwargs.get(names[0])
        weight = args[positions[1]] if len(args) > positions[1] else kwargs.get(names[1])
        if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
            return
        if self._hear is not None:
            self._hear(x)
        if func is F.conv2d:
            matrix = self._tracked.get(_address(weight))
            if matrix is not None and weight.ndim == 4:
                self._see_matrix(matrix, patches(x, matrix.owner), weight.flatten(1), positions[2])
            return
        self._see_operands(x, weight, positions[2])
        known = _address(x) in self._tracked or _address(x) in self._stacks
        if func is not F.linear and known and x.ndim >= 2 and weight.ndim >= 2:
            # A weight on the left: W · Xᵀ is (X · Wᵀ)ᵀ.
            self._see_operands(weight.mT, x, 1 - positions[2])

    def _see_operands(self, x: Tensor, weight: Tensor, input_dim: int) -> None:
        """Report a product. x: the other operand of a matrix `weight`, or of a mixture's experts (then E × T × I)."""
        if weight.ndim == 2 and (matrix := self._tracked.get(_address(weight))) is not None:
            self._see_matrix(matrix, x, weight, input_dim)
        elif weight.ndim == 3:
            for matrix in self._stacks.get(_address(weight), []):
                if x.ndim == 3 and len(x) == len(weight) == matrix.stacked:
                    self._see_matrix(matrix, x[matrix.expert], weight[matrix.expert], input_dim)

    def _see_sum(self, equation: Any, x: Any, weight: Any) -> None:
        """Report an einsum product such as `ibh,hnd->ibnd`, with a matrix inputs × heads × width."""
        found = re.fullmatch(r"(\w+),(\w+)->(\w+)", equation.replace(" ", "")) if isinstance(equation, str) else None
        if found is None or not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
            return
        if self._hear is not None:
            self._hear(x)
        matrix = self._tracked.get(_address(weight))
        if matrix is None or not matrix.is_of_heads or weight.shape != getattr(matrix.owner, matrix.attribute).shape:
            return
        given, own, left = found.groups()
        summed = "".join(letter for letter in own if letter in given and letter not in left)
        if summed == own[0] and not set(own[1:]) & set(given):
            self._on_product(matrix, x if given[-1] == summed else x.movedim(given.index(summed), -1))
        elif summed == own[1:]:
            self._on_backwards(matrix)

    def _see_matrix(self, matrix: Matrix, x: Tensor, weight: Tensor, input_dim: int) -> None:
        stored = matrix.stored()
        if weight.numel() != stored.numel():
            return  # a part of the matrix; if the whole is never seen, the walk reports it
        as_stored = weight.shape == stored.shape and weight.stride() == stored.stride()
        if (input_dim if as_stored else 1 - input_dim) != matrix.input_dim:
            self._on_backwards(matrix)
        else:
            self._on_product(matrix, x)


class Touches(TorchFunctionMode):
    """While active, records the `names` of matrices that take part in any operation, and what top-k chooses among."""

    def __init__(self, matrices: Iterable[Matrix]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.ranked: set[int] = set()
        """Lengths of the last dimension of the values."""
        self._tracked = {_address(getattr(m.owner, m.attribute)): m.name for m in matrices if m.expert is None}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not _asks_only(func):
            addresses = {_address(value) for value in _operands(args, kwargs) if isinstance(value, Tensor)}
            self.names |= {self._tracked[address] for address in addresses & self._tracked.keys()}
        if func in (torch.topk, Tensor.topk):
            self.ranked.add(_operands(args, kwargs)[0].shape[-1])
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """While active, records the `ids` of given tensors that take part in any operation."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.ids: set[int] = set()
        self._watched = {id(tensor) for tensor in tensors}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not _asks_only(func):
            self.ids |= self._watched & {id(value) for value in _operands(args, kwargs)}
        return func(*args, **(kwargs or {}))


def _asks_only(func: Callable[..., Any]) -> bool:
    """Return whether a function only reads an attribute of a tensor (dtype, shape), not its values."""
    return getattr(func, "__name__", "") == "__get__"


def _operands(args: tuple[Any, ...], kwargs: Any) -> list[Any]:
    """Return all arguments of a function, including those in lists."""
    given = [*args, *(kwargs or {}).values()]
    return given + [part for value in given if isinstance(value, list | tuple) for part in value]


@dataclass
class Products:
    """Matrices that were multiplied while a block ran."""

    groups: list[list[Matrix]] = field(default_factory=list)
    """Matrices in order of first use, grouped by input tensor."""
    reused: list[Matrix] = field(default_factory=list)
    """Once for every use after the first."""
    unseen: list[Matrix] = field(default_factory=list)
    backwards: list[Matrix] = field(default_factory=list)
    """Multiplied along their outputs."""
    touched: set[str] = field(default_factory=set)
    """Names of those (except experts) that took part in any operation."""
    ranked: set[int] = field(default_factory=set)
    """Numbers of values among which top-k chose."""


def observe_products(matrices: Sequence[Matrix], run: Callable[[], Result]) -> tuple[Result, Products]:
    """Call `run`, which runs a block, and record which matrices share an input, are reused, or never appear.

    Nothing is refused; matrices that cannot be pruned are only recorded.
    """
    products = Products()
    inputs: list[Tensor] = []  # held until the block is done, since a freed tensor's address may be reused
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

    touches, observe = Touches(matrices), Observe(matrices, on_product, products.backwards.append)
    with touches, observe:
        result = run()
    products.touched, products.ranked = touches.names, touches.ranked
    products.unseen = [matrix for matrix in matrices if matrix.name not in seen]
    return result, products


def patches(x: Tensor, convolution: nn.Module) -> Tensor:
    """Return the patches that a convolution without overlaps multiplies with its weight, position by position.

    x: B × C × H × W (or without B). Returns … × positions × (C · kernel height · kernel width).
    """
    assert isinstance(convolution, nn.Conv2d)
    height, width = convolution.stride
    if tuple(convolution.kernel_size) == (1, 1):
        return x[..., ::height, ::width].flatten(-2).transpose(-1, -2)
    return F.unfold(x, (height, width), stride=(height, width)).transpose(-1, -2)


def _address(tensor: Tensor) -> _Address:
    return tensor.device, address_of(tensor)
