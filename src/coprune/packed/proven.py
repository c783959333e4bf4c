"""Products that first prove themselves: used where they give what a known product gives, and take less time on this device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from coprune.packed.timing import time_in_turns

REPEATS = 5
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the largest output; both ways add up in another order."""

Product = Callable[[Tensor], Tensor]


class Kind(NamedTuple):
    """Products that take about equally long."""

    way: str
    """Of making them: what is compared with an unpacked copy."""
    device: torch.device
    shape: tuple[int, ...]
    dtype: torch.dtype
    twentieths: int
    """Of the weights that are kept."""
    inputs: int
    """How many there are, or of how many bits that number is."""


TRIED: dict[Kind, bool] = {}
"""Whether the way won, of every kind that has come so far."""


def by_the_faster(kind: Kind, candidate: Product, known: Product, x: Tensor) -> Tensor:
    """Make a product in the way that is faster here. The first of a kind is made both ways, in turns.

    Args:
        kind: of the product.
        candidate: the way that has to prove itself. It may fail.
        known: the other way.
        x: T × I.

    Returns:
        T × O.
    """
    if kind not in TRIED:
        TRIED[kind] = wins(candidate, known, x)
    return candidate(x) if TRIED[kind] else known(x)


def wins(candidate: Product, known: Product, x: Tensor) -> bool:
    """Whether a product gives what another gives, and takes less time. It may fail."""
    if not gives_the_same(candidate, known, x):
        return False
    times = time_in_turns({"candidate": partial(candidate, x), "known": partial(known, x)}, REPEATS)
    return times["candidate"].median < times["known"].median


def gives_the_same(candidate: Product, known: Product, x: Tensor) -> bool:
    """Whether a product gives what another gives, up to rounding. It may fail."""
    wanted = known(x)
    try:
        found = candidate(x)
    except Exception:  # of torch, the driver, Triton's compiler or the one that it calls: each has its own types
        return False
    return float((found - wanted).abs().max()) <= TOLERANCE[x.dtype] * float(wanted.abs().max())  # NaN is not
