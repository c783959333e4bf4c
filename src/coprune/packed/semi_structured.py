"""PyTorch's semi-structured (2:4) products on NVIDIA GPUs, of converted dense layers and of packed weights.

A packed weight that stores exactly two of every four inputs has its values in the order of torch's CUTLASS product. The
metadata that it needs besides are made from the bitmask for every product, so nothing is stored twice. Torch supports GPUs of
compute capability 8.x. Not measured on such a GPU: `bench`, `accelerate` and the packed operator time it before use.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from coprune.base.devices import capability
from coprune.packed.header import Header
from coprune.packed.timing import Kind, Product, gives_the_same
from coprune.packed.two_of_four import CODES, COLUMNS, DTYPES, ROWS, fits

INPUTS = 8
"""Divisor of T that torch requires."""


def is_two_of_four(weight: Tensor) -> bool:
    """Return whether every four consecutive inputs of an O × I weight have at most two nonzeros."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).view(weight.shape[0], -1, 4).sum(dim=2) <= 2).all())


def can_convert(linear: nn.Linear) -> bool:
    """Return whether PyTorch has a semi-structured product for a layer's device, dtype, shape and pattern."""
    weight = linear.weight
    if capability(weight.device) < (8, 0) or weight.dtype not in DTYPES:
        return False
    if weight.shape[0] % ROWS or weight.shape[1] % COLUMNS:
        return False
    return is_two_of_four(weight)


def semi_structured_linear(linear: nn.Linear) -> nn.Linear | None:
    """Copy a layer with a semi-structured weight (can_convert must hold), for inference; None if torch refuses it.

    Which GPUs torch converts for depends on what it was built with.
    """
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    try:
        weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
    except RuntimeError:
        return None
    copy.weight = nn.Parameter(weight, requires_grad=False)
    copy.bias = linear.bias
    x = torch.randn(2 * INPUTS, linear.in_features).to(linear.weight)
    return copy.train(linear.training) if gives_the_same(copy, linear, x) else None


def convert_linears(model: nn.Module) -> int:
    """Replace, in place, the linear layers that torch converts. Returns how many they are."""
    replaced = 0
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and can_convert(module) and (made := semi_structured_linear(module)) is not None:
            model.set_submodule(name, made)
            replaced += 1
    return replaced


def product_serves(x: Tensor, header: Header) -> bool:
    """Return whether torch's product supports inputs (T × I) and a weight of these dtypes and shapes."""
    return len(x) > 0 and x.dtype == header.dtype and fits(header)


def product_of_many(x: Tensor, blob: Tensor, header: Header) -> tuple[Kind, Product]:
    """Return torch's semi-structured product, and its kind.

    Args:
        x: T × I, which `product_serves`.
        blob: a weight that `stores_two_of_four`, aligned, on x's device.
        header: of the weight, O × I.
    """
    # Prompt lengths vary, so one measurement serves all lengths of the same bit count.
    kind = Kind("semi-structured", x.device, header.shape, header.dtype, 10, len(x).bit_length())
    return kind, partial(multiply, blob, header)


def multiply(blob: Tensor, header: Header, x: Tensor) -> Tensor:
    """Multiply. Arguments: those of `product_of_many`. Returns T × O."""
    stored = blob[header.values_at : header.values_at + header.numel // 2 * header.dtype.itemsize]
    values = stored.view(header.dtype).view(header.shape[0], -1)
    padded = functional.pad(x, (0, 0, 0, -len(x) % INPUTS))
    y: Tensor = torch._sparse_semi_structured_mm(values, metadata(blob, header), padded.t())
    return y.t()[: len(x)].contiguous()


def metadata(blob: Tensor, header: Header) -> Tensor:
    """Return the positions of values in CUTLASS's layout.

    Args:
        blob: a weight that `stores_two_of_four`.
        header: of the weight, O × I, multiples of ROWS and COLUMNS.

    Returns:
        O × I/16 int16, on its device: four bits of every four inputs, reordered.
    """
    pattern = blob[header.pattern_at : header.pattern_at + header.pattern_bytes]
    codes = _codes_on(blob.device).index_select(0, pattern.int()).view(torch.int16)
    # Row 32R + 8(2a + d) + b and column 2C + c go to row 32R + 4b + 2a + c and column 2C + d, where two columns lie beside each
    # other and the pairs one after another.
    rows, columns = header.shape[0], header.shape[1] // 16
    parts = codes.view(rows // ROWS, 2, 2, 8, columns // 2, 2)  # R a d b C c
    return parts.permute(4, 0, 3, 1, 5, 2).contiguous().view(rows, columns)


@cache
def _codes_on(device: torch.device) -> Tensor:
    return torch.from_numpy(CODES).to(device)
