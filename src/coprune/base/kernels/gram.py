"""The operations on symmetric sums of products of inputs, of which only one half is computed.

`panel_size`: width → number of rows of the I × I sums in a panel. `add_to_gram`: (sums I × I float32, inputs T × I floating,
panel size, a multiple of 64 or at least I) adds XᵀX in place, on every panel's part of the diagonal and to its right.
Elements left of it are not changed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from coprune.base.devices import capability
from coprune.base.native import solving

PANEL = 128
"""Rows of a Gram matrix that one product adds to on a CPU: enough that the product runs at full speed."""
WIDE_PANEL = 2048
"""The same on a GPU: a batch of 4096 tokens keeps it busy for milliseconds, and a launch takes microseconds."""


def panel_for_caches(width: int) -> int:
    """Return the panel size at which little more than half of the products are computed."""
    return PANEL


def panel_for_devices(width: int) -> int:
    """Return the whole matrix as one panel, unless the products take a GPU longer than the launches."""
    return min(width, WIDE_PANEL)


def panels(width: int, size: int) -> Iterator[slice]:
    """Return the panels of a matrix of this width, in order."""
    return (slice(start, min(start + size, width)) for start in range(0, width, size))


def add_with_torch(gram: Tensor, x: Tensor, panel_size: int) -> None:
    """Add with torch's float32 products."""
    x = x.to(torch.float32)
    for panel in panels(x.shape[1], panel_size):
        gram[panel, panel.start :].addmm_(x[:, panel].T, x[:, panel.start :])


def add_on_tensor_cores(gram: Tensor, x: Tensor, panel_size: int) -> None:
    """Add with products of 16-bit inputs, exact and summed in float32; other inputs as with torch.

    Not run on a GPU yet. NVIDIA GPUs before Ampere have no such products of bfloat16.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or (x.is_cuda and capability(x.device) < (8, 0)):
        add_with_torch(gram, x, panel_size)
        return
    for panel in panels(x.shape[1], panel_size):
        gram[panel, panel.start :].add_(torch.mm(x[:, panel].T, x[:, panel.start :], out_dtype=torch.float32))


def add_natively(gram: Tensor, x: Tensor, panel_size: int) -> None:
    """Add with a native bfloat16 kernel, summed in float32, if the processor supports it."""
    if not solving.add_to_gram(gram, x, panel_size):
        add_with_torch(gram, x, panel_size)
