"""A linear layer whose weight stays as it is, multiplied by the native kernels where few inputs come at a time."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from coprune.base.devices import in_host_memory
from coprune.base.native.build import MatrixStruct, load_kernels
from coprune.base.native.product import IN_KERNEL, multiply_at, serves

_library = torch.library.Library("coprune", "FRAGMENT")
_library.define("dense_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class KernelLinear(nn.Linear):
    """`nn.Linear` that reads its weight once for a few inputs, which PyTorch's product on CPUs does more slowly in bfloat16.

    The weight is the layer's own parameter, which other modules may share (tied embeddings).
    """

    def forward(self, input: Tensor) -> Tensor:
        """… × I to … × O."""
        if torch.is_grad_enabled():
            return super().forward(input)
        operators: Any = torch.ops.coprune
        product: Tensor = operators.dense_product.default(input, self.weight, self.bias)
        return product


def kernel_linear(linear: nn.Linear) -> KernelLinear | None:
    """The layer with the same parameters, multiplied by the kernels; None where they do not serve it."""
    weight, bias = linear.weight, linear.bias
    there = in_host_memory(weight.device) and weight.is_contiguous()
    if not there or load_kernels() is None or not serves(weight.dtype, None if bias is None else bias.dtype):
        return None
    made = KernelLinear(1, 1, bias=False, device="meta")
    made.in_features, made.out_features = linear.in_features, linear.out_features
    made.weight, made.bias = weight, bias
    return made.train(linear.training)


def _with_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    library, (outputs, inputs), dtype = load_kernels(), weight.shape, weight.dtype
    known = x.dtype == dtype and serves(dtype, None if bias is None else bias.dtype)
    plain = weight.is_contiguous() and (bias is None or bias.is_contiguous())
    plain = plain and x.shape[-1] == inputs  # else torch says what is wrong
    if library is None or not known or not plain or (batch := x.numel() // inputs) > IN_KERNEL[dtype]:
        return functional.linear(x, weight, bias)
    _, address = _matrix_at(weight.data_ptr(), None if bias is None else bias.data_ptr(), outputs, inputs)
    return multiply_at(address, x.contiguous(), outputs, batch, dense=True)


@functools.lru_cache(1024)
def _matrix_at(weight: int, bias: int | None, outputs: int, inputs: int) -> tuple[MatrixStruct, int]:
    """What the kernels take, and its address. Only addresses and sizes, so the same ones always mean the same."""
    struct = MatrixStruct(None, weight, None, bias, outputs, inputs)
    return struct, ctypes.addressof(struct)


def _shape_alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"the input has {x.shape[-1]} columns, not {weight.shape[1]}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_library.impl("dense_product", _with_torch, "CompositeExplicitAutograd")
_library.impl("dense_product", _on_cpu, "CPU")
_library.impl("dense_product", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("coprune::dense_product", _shape_alone, lib=_library)
