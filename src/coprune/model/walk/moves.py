"""How a walk moves the calibration inputs from block to block. What excludes each other is a type of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ByBlock:
    """The papers' way: a block's statistics come from its dense weights, then it runs again with the pruned ones."""

    keep_inputs: bool = False
    """Whether a block's inputs are still there when it is done, for a caller that trains it."""


@dataclass(frozen=True)
class Sequential:
    """Every matrix is shown just before its first use, so that it sees what its pruned predecessors give; one pass."""

    keep_inputs: bool = False
    """As in `ByBlock`; the block then runs once more."""


@dataclass(frozen=True)
class Dense:
    """Every block runs once, with its dense weights: it sees what it would see in the dense model, whatever is pruned
    before it. Also the way of callers that only look."""

    keep: Callable[[Tensor], Tensor] | None = None
    """What to keep of a batch's inputs (B × S × H) until their block is done; None for nothing."""
    batches: int | None = None
    """Of how many batches that is kept, the first ones; None for all."""


Moves = ByBlock | Sequential | Dense
BY_BLOCK = ByBlock()
