"""The memory of training the whole model, from the shapes of its weights, without importing anything of training."""

from __future__ import annotations

from collections.abc import Iterable

# A weight and its gradient in float32, and the moments of the optimiser.
TRAINED_BYTES = 16
_HELD_BYTES = 4
"""A weight that is not trained, in float32 beside those that are."""


def training_bytes(sizes: Iterable[tuple[str, int]], scope: str) -> int:
    """Return what a model's weights take while they are trained, with gradients and moments.

    Args:
        sizes: names of its tensors, and how many weights each has.
        scope: as the settings of a fine-tuning name it; what is in a block is told by numbers in names, and routers are
            next to nothing.
    """
    needed = 0
    for name, size in sizes:
        trained = scope == "all" or (scope == "blocks" and any(map(str.isdigit, name.split("."))))
        needed += size * (TRAINED_BYTES if trained else _HELD_BYTES)
    return needed
