"""The product of a packed matrix as an operator of torch, which torch.compile and torch.export take as it is.

`coprune::packed_linear` has gradients; `coprune::packed_product` is the same without, since the way through torch's gradients
costs as much as a small product. Both have one implementation for every device, which unpacks the weight for the length of the
call, and two that multiply from the packed bytes: for the CPU, by the native kernels where they serve, and for CUDA, where that
wins (`proven`), by Triton's for a few inputs (`of_few`) and by torch's semi-structured product for many (`semi_structured`). They
are functions of tensors alone, so an exported program needs nothing but `import coprune.packed.operator` where it runs.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from coprune.base.native.build import MatrixStruct, load_kernels
from coprune.base.native.product import IN_KERNEL, NativeMatrix, matrix_at, multiply_at, serves
from coprune.packed.header import Header
from coprune.packed.matrix import dense_matrix
from coprune.packed.of_few import kernel_serves, product_of_few
from coprune.packed.proven import by_the_faster
from coprune.packed.semi_structured import product_of_many, product_serves

_library = torch.library.Library("coprune", "DEF")
_FIELDS = "Tensor packed, Tensor starts, Tensor? bias, int inputs, ScalarType dtype, bool two_of_four"
for _name in ("packed_linear", "packed_product"):
    _library.define(f"{_name}(Tensor x, {_FIELDS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class Weight(NamedTuple):
    """A packed weight and its bias, as the operators take them behind the inputs."""

    packed: Tensor
    """In the bitmask layout, as `for_kernels` gives it."""
    starts: Tensor
    """O + 1 int64, as `row_starts` gives them."""
    bias: Tensor | None
    """O, or None."""
    inputs: int
    """I."""
    dtype: torch.dtype
    two_of_four: bool
    """Whether it `stores_two_of_four`."""


def packed_linear(x: Tensor, weight: Weight) -> Tensor:
    """Multiply by a packed weight.

    Args:
        x: … × I, floating, on the weight's device.
        weight: O × I.

    Returns:
        … × O in x's dtype.
    """
    operators: Any = torch.ops.coprune
    kernel = operators.packed_linear.default if torch.is_grad_enabled() else operators.packed_product.default
    y: Tensor = kernel(x, *weight)
    return y


def unpacked_product(x: Tensor, *fields: Any) -> Tensor:
    """What the operators do on any device: the weight is unpacked for the length of the call. fields: of a Weight."""
    weight = Weight(*fields)
    dense, bias = dense_matrix(weight.packed, _header(weight)), weight.bias
    return functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _on_cpu(x: Tensor, *fields: Any) -> Tensor:
    packed, starts, bias, inputs, dtype, _ = weight = Weight(*fields)
    library, outputs, batch = load_kernels(), starts.numel() - 1, x.numel() // inputs
    known = x.dtype == dtype and serves(dtype, None if bias is None else bias.dtype)
    known = known and x.shape[-1] == inputs  # else torch says what is wrong
    if library is None or not known or not (bias is None or bias.is_contiguous()):
        return unpacked_product(x, *weight)
    if batch > IN_KERNEL[dtype]:
        return NativeMatrix(packed, starts, _header(weight), bias, library).product(x)
    bias_at = None if bias is None else bias.data_ptr()
    _, address = _kernel_matrix(packed.data_ptr(), starts.data_ptr(), bias_at, outputs, inputs, dtype)
    return multiply_at(address, x.contiguous(), outputs, batch)


def on_gpu(x: Tensor, *fields: Any) -> Tensor:
    """What the operators do on CUDA. fields: of a Weight."""
    packed, starts, bias, inputs, dtype, two_of_four = weight = Weight(*fields)
    header = _known_header(packed.numel(), starts.numel() - 1, inputs, dtype)
    rows = x.reshape(-1, inputs)
    if kernel_serves(rows, header):
        kind, candidate = product_of_few(rows, packed, header, starts)
    elif two_of_four and product_serves(rows, header):
        kind, candidate = product_of_many(rows, packed, header)
    else:
        return unpacked_product(x, *weight)

    def with_bias(rows: Tensor) -> Tensor:
        y = candidate(rows)
        return y if bias is None else y + bias.to(y.dtype)

    y = by_the_faster(kind, with_bias, lambda rows: unpacked_product(rows, *weight), rows)
    return y.reshape(*x.shape[:-1], header.shape[0])


@functools.lru_cache(8192)
def _kernel_matrix(
    packed: int, starts: int, bias: int | None, outputs: int, inputs: int, dtype: torch.dtype
) -> tuple[MatrixStruct, int]:
    """What the kernels take, and its address. Only addresses and sizes, so the same ones always mean the same."""
    struct = matrix_at(packed, starts, bias, Header("bitmask", dtype, (outputs, inputs), 0))
    return struct, ctypes.addressof(struct)


def _header(weight: Weight) -> Header:
    """A header that says where what lies. How many values there are the bitmask knows; here they reach to the end."""
    return _header_of(weight.packed.numel(), weight.starts.numel() - 1, weight.inputs, weight.dtype)


def _header_of(nbytes: int, outputs: int, inputs: int, dtype: torch.dtype) -> Header:
    header = Header("bitmask", dtype, (outputs, inputs), 0)
    return replace(header, kept=(nbytes - header.values_at) // dtype.itemsize)


# Where products are computed: what is traced may have sizes that are no numbers.
_known_header = functools.lru_cache(8192)(_header_of)


def _shape_alone(x: Tensor, *fields: Any) -> Tensor:
    weight = Weight(*fields)
    torch._check(
        x.shape[-1] == weight.inputs,
        lambda: f"the input has {x.shape[-1]} columns; this layer takes {weight.inputs}.",
    )
    return x.new_empty((*x.shape[:-1], weight.starts.shape[0] - 1))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, starts, _, *ctx.plain = inputs[1:]
    ctx.save_for_backward(packed, starts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x and the bias; what is packed does not train. The weight is unpacked anew, so that no graph holds it dense."""
    packed, starts = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = grad @ dense_matrix(packed, _header(Weight(packed, starts, None, *ctx.plain))).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return to_x, None, None, to_bias, None, None, None


for _name in ("packed_linear", "packed_product"):
    _library.impl(_name, unpacked_product, "CompositeExplicitAutograd")
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, on_gpu, "CUDA")
    torch.library.register_fake(f"coprune::{_name}", _shape_alone, lib=_library)
torch.library.register_autograd("coprune::packed_linear", _backward, setup_context=_remember, lib=_library)
_library.impl("packed_product", torch.library.fallthrough_kernel, "Autograd")
