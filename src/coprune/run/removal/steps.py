"""What a part keeps when it loses so many steps: the levels between which an uneven budget chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from coprune.model.blocks import Block
from coprune.model.removal.parts import Part
from coprune.model.walk.inputs import Inputs
from coprune.pruning.evolution import Steps

__all__ = ["Levels", "Steps"]


@dataclass(frozen=True)
class Levels:
    """A part with what it keeps at every level, the whole part first."""

    block: Block
    part: Part
    counts: list[int]
    """Units that are kept."""
    keeps: list[list[Tensor]]
    """Which: U bool for each consumer, by level."""
    costs: list[float]
    """Squared error of the consumers' outputs, relative to them."""
    moved: float
    """What the block changes in the hidden states of the dense model."""
    inputs: Mapping[str, Inputs]
    """Of the consumers in the dense model, by name."""

    def steps_to(self, count: int) -> int:
        """How many steps it loses when so many units are kept."""
        return self.counts.index(count)
