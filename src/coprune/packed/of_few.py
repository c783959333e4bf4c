"""Products of a few inputs with a packed weight on a GPU, from the packed bytes, by Triton's kernel."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from coprune.base.kernels.table import triton_is_there
from coprune.packed.header import Header
from coprune.packed.proven import Kind, Product

MOST_INPUTS = 16
"""With more, a product of a dense copy is bound by arithmetic and no longer by what is read."""


def kernel_serves(x: Tensor, header: Header) -> bool:
    """Whether Triton is there and its kernel takes such inputs. x: T × I."""
    few = 0 < len(x) <= MOST_INPUTS
    return few and x.dtype == header.dtype and header.shape[1] % 32 == 0 and triton_is_there()


def product_of_few(x: Tensor, blob: Tensor, header: Header, starts: Tensor) -> tuple[Kind, Product]:
    """What multiplies from the packed bytes, and the kind of product that it would be.

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
