"""The product of a packed matrix as an operator of torch, for torch.compile and torch.export.

`coprune::packed_linear` has gradients; `coprune::packed_product` has none, since torch's dispatch for gradients costs as much as
a small product. Both have one implementation for every device, which unpacks the weight, and two that multiply from the packed
bytes: native kernels on the CPU, and on CUDA, where that is faster (`proven`), Triton for few inputs and torch's
semi-structured product for many. An exported program needs only `import coprune.packed.operator`.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput
from coprune.base.kernels.table import kernel, triton_is_there
from coprune.base.native.build import MatrixStruct, load_kernels
from coprune.base.native.product import IN_KERNEL, NativeMatrix, count_rows, matrix_at, multiply_at, serves
from coprune.packed.format import aligned_bytes, assemble_packed, in_byte_order, keep_bits, pack_tensor
from coprune.packed.header import Header, read_header
from coprune.packed.semi_structured import product_of_many, product_serves
from coprune.packed.timing import Kind, Product, by_the_faster
from coprune.packed.two_of_four import fill_up

_library = torch.library.Library("coprune", "DEF")
_FIELDS = "Tensor packed, Tensor starts, Tensor? bias, int inputs, ScalarType dtype, bool two_of_four"
for _name in ("packed_linear", "packed_product"):
    _library.define(f"{_name}(Tensor x, {_FIELDS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class Weight(NamedTuple):
    """A packed weight and its bias, as the operators take them behind the inputs."""

    packed: Tensor
    """Packed weight in the bitmask layout, from `for_kernels`."""
    starts: Tensor
    """O + 1 int64, as `row_starts` gives them."""
    bias: Tensor | None
    """O, or None."""
    inputs: int
    """I."""
    dtype: torch.dtype
    two_of_four: bool
    """Result of `stores_two_of_four`."""


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
    """Unpack the weight, multiply, and free it: the operators' fallback on any device. fields: of a Weight."""
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
    """Multiply on CUDA. fields: of a Weight."""
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
    """Return the kernels' argument and its address, cached by addresses and sizes."""
    struct = matrix_at(packed, starts, bias, Header("bitmask", dtype, (outputs, inputs), 0))
    return struct, ctypes.addressof(struct)


def _header(weight: Weight) -> Header:
    """Return a header with the offsets. The bitmask has the number of values; here they reach to the end."""
    return _header_of(weight.packed.numel(), weight.starts.numel() - 1, weight.inputs, weight.dtype)


def _header_of(nbytes: int, outputs: int, inputs: int, dtype: torch.dtype) -> Header:
    header = Header("bitmask", dtype, (outputs, inputs), 0)
    return replace(header, kept=(nbytes - header.values_at) // dtype.itemsize)


# Only for real tensors: traced ones may have symbolic sizes.
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
    """Return the gradients of x and the bias. The weight is unpacked again, so that no graph holds it dense."""
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


def pack_matrix(weight: Tensor) -> Tensor | None:
    """Pack an O × I weight for multiplication (bitmask layout), or None where that would not be smaller.

    Negative zeros become zeros, which no product tells apart.
    """
    return pack_tensor(weight, "bitmask", drop_negative_zeros=True)


def for_kernels(blob: Tensor) -> Tensor:
    """Convert a matrix to the bitmask layout of the kernels, aligned; a 2:4 one may gain zeros (`fill_up`).

    blob: a packed tensor that check_packed accepts, with two dimensions (else BadInput).
    """
    header = read_header(blob)
    if len(header.shape) != 2:
        raise BadInput(f"a packed tensor of the shape {header.shape} is not a matrix")
    if header.layout == "bitmask":
        return fill_up(aligned_bytes(blob), header)
    # Padding zeros of the N:M layout stay values: dropping them would need another pass for a few bytes.
    pattern = np.packbits(keep_bits(blob, header), bitorder="little")
    bitmask = Header("bitmask", header.dtype, header.shape, header.kept)
    stored = aligned_bytes(blob)[header.values_at : header.values_at + header.values_bytes]
    return assemble_packed(bitmask, pattern, in_byte_order(stored, header.dtype.itemsize))


def row_starts(blob: Tensor, header: Header) -> Tensor:
    """Count the values before each row of a packed matrix in the bitmask layout.

    Args:
        blob: on any device.
        header: its header.

    Returns:
        O + 1 int64 on its device; the last is the number of all values.

    Raises:
        BadInput: the bitmask's number of ones differs from the number of values, so that kernels would read past the end.
    """
    starts = count_rows(blob, header) if in_host_memory(blob.device) else None
    if starts is None:
        ones = _bits(blob, header).reshape(header.shape).sum(dim=1, dtype=torch.int64)
        starts = torch.cat([ones.new_zeros(1), ones.cumsum(0)])
    if int(starts[-1]) != header.kept:
        raise BadInput("damaged packed matrix: the bitmask and the number of values disagree")
    return starts


def native_matrix(blob: Tensor, starts: Tensor, header: Header, bias: Tensor | None) -> NativeMatrix | None:
    """Prepare a packed matrix for the kernels; None if they are missing or do not support its device or dtype."""
    found: NativeMatrix | None = kernel("packed_product", blob.device)(blob, starts, header, bias)
    return found


def dense_matrix(blob: Tensor, header: Header) -> Tensor:
    """Unpack a matrix in the bitmask layout on the blob's device, with torch operations only."""
    keep = _bits(blob, header).to(torch.bool)
    stored = blob[header.values_at : header.values_at + header.values_bytes]
    values = in_byte_order(stored, header.dtype.itemsize).view(header.dtype)
    dense = torch.zeros(header.numel, dtype=header.dtype, device=blob.device)
    return dense.masked_scatter_(keep, values).reshape(header.shape)


def _bits(blob: Tensor, header: Header) -> Tensor:
    """Return the bitmask, a uint8 for every weight."""
    pattern = blob[header.pattern_at : header.pattern_at + header.pattern_bytes]
    shifts = torch.arange(8, dtype=torch.uint8, device=blob.device)
    return ((pattern[:, None] >> shifts) & 1).reshape(-1)[: header.numel]


MOST_INPUTS = 16
"""Maximum inputs at which a product is bound by memory bandwidth; above, by arithmetic."""


def kernel_serves(x: Tensor, header: Header) -> bool:
    """Return whether the Triton kernel can multiply by such inputs. x: T × I."""
    few = 0 < len(x) <= MOST_INPUTS
    return few and x.dtype == header.dtype and header.shape[1] % 32 == 0 and triton_is_there()


def product_of_few(x: Tensor, blob: Tensor, header: Header, starts: Tensor) -> tuple[Kind, Product]:
    """Return the product from packed bytes by Triton, and its kind.

    Args:
        x: T × I, which `kernel_serves`.
        blob: the weight in the bitmask layout, as `for_kernels` gives it.
        header: of the weight, O × I.
        starts: O + 1 int64, as `row_starts` gives them.
    """
    from coprune.packed.triton_kernel import multiply

    twentieths = round(20 * header.kept / header.numel)
    kind = Kind("from the bitmask, by Triton", x.device, header.shape, header.dtype, twentieths, len(x))
    return kind, partial(multiply, blob, header, starts)
