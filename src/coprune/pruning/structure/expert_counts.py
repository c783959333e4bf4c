"""How many experts of a mixture are kept: a number that programs which serve mixtures take, near what was asked for."""

from __future__ import annotations

import math

SERVED = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)
"""Numbers of experts that vLLM's kernels are compiled for; others run slower, or not at all."""
_FEW = 16
"""Mixtures of so many experts run on one device, and keep any number."""
_NEAR = 0.1
"""A served number is taken where it changes how many experts go by no more than this share of them."""


def count_left(count: int, share: float, groups: int = 1, align: int | None = None) -> int:
    """Return how many experts stay when about a share of them goes.

    Args:
        count: how many there are.
        share: of them that goes.
        groups: of which as many have to stay.
        align: what the number has to be a multiple of; None for a served number where one is near, else one that
            divides well among devices: a multiple of 8, or of less in mixtures of fewer than 64.

    Returns:
        The number, no less than one of every group; `count` if none would go.
    """
    by_itself = align is None and count > _FEW
    fine = min(8, 1 << (count // 8).bit_length() - 1) if by_itself else align or 1
    step, wanted = math.lcm(groups, fine), count * (1 - share)
    if by_itself:
        near = [
            served for served in SERVED if served % groups == 0 and abs(served - wanted) <= _NEAR * (count - wanted)
        ]
        if near:
            return min(near, key=lambda served: abs(served - wanted))
    kept = max(step, round(wanted / step) * step)
    return kept - step if by_itself and kept >= count > round(wanted) and count > step else min(kept, count)
