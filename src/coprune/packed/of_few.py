"""Products of a few inputs with a packed weight on a GPU: from the packed bytes, or from an unpacked copy.

Which is faster depends on the GPU, the shape and how many zeros there are. So the first product of every kind is made both
ways, in turns, and Triton's kernel is used from then on where it wins and gives the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from coprune.base.kernels.table import triton_is_there
from coprune.packed.header import Header
from coprune.packed.timing import time_in_turns

MOST_INPUTS = 16
"""With more, a product of a dense copy is bound by arithmetic and no longer by what is read."""
REPEATS = 5
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the largest output; both ways add up in another order."""

Product = Callable[[Tensor], Tensor]


class Kind(NamedTuple):
    """Products that take equally long."""

    device: torch.device
    shape: tuple[int, ...]
    dtype: torch.dtype
    twentieths: int
    """Of the weights that are kept."""
    inputs: int


_WINS: dict[Kind, bool] = {}


def kernel_serves(x: Tensor, header: Header) -> bool:
    """Whether Triton is there and its kernel takes such inputs. x: … × I."""
    few = 0 < x.numel() // header.shape[1] <= MOST_INPUTS
    return few and x.dtype == header.dtype and header.shape[1] % 32 == 0 and triton_is_there()


def product_of_few(x: Tensor, blob: Tensor, header: Header, starts: Tensor, unpacked: Product) -> Tensor:
    """Multiply by a packed weight in the way that is faster here.

    Args:
        x: T × I, which `kernel_serves`.
        blob: the weight in the bitmask layout, as `for_kernels` gives it.
        header: of the weight, O × I.
        starts: O + 1 int64, as `row_starts` gives them.
        unpacked: the other way.

    Returns:
        T × O.
    """
    from coprune.packed.triton_kernel import multiply

    kind = Kind(x.device, header.shape, header.dtype, round(20 * header.kept / header.numel), len(x))
    by_kernel = partial(multiply, blob, header, starts)
    if kind not in _WINS:
        _WINS[kind] = wins(by_kernel, unpacked, x)
    return by_kernel(x) if _WINS[kind] else unpacked(x)


def wins(candidate: Product, known: Product, x: Tensor) -> bool:
    """Whether a product gives what another gives, and takes less time. It may fail."""
    wanted = known(x)
    try:
        found = candidate(x)
    except Exception:  # of Triton's compiler, of the C compiler that it calls, of the driver: each has types of its own
        return False
    if not float((found - wanted).abs().max()) <= TOLERANCE[x.dtype] * float(wanted.abs().max()):  # NaN neither
        return False
    times = time_in_turns({"candidate": partial(candidate, x), "known": partial(known, x)}, REPEATS)
    return times["candidate"].median < times["known"].median
