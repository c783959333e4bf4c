"""What a walk shows its caller, and what it takes over from earlier runs."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from coprune.model.blocks import Block
from coprune.model.matrices import Matrix
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.statistics import Statistic

OUTSIDE = "outside"
"""In `Past.known`, the matrices after the blocks."""
Known = Mapping[str, Callable[[], dict[str, Inputs]]]


@dataclass(frozen=True)
class MatricesReady:
    """Matrices whose inputs are known, to be pruned (or looked at) now. Those of one event share their inputs."""

    matrices: list[Matrix]
    inputs: Inputs | None
    """None where no calibration data runs through the model."""

    def known(self) -> dict[str, Inputs]:
        """What is known of each matrix's inputs, by its name."""
        return {} if self.inputs is None else dict.fromkeys((m.name for m in self.matrices), self.inputs)

    def statistics(self) -> dict[str, Statistic]:
        """The statistic of each matrix's inputs, by its name; none where no token was seen."""
        found = {name: inputs.statistic for name, inputs in self.known().items()}
        return {name: statistic for name, statistic in found.items() if statistic and statistic.count}


@dataclass(frozen=True)
class BlockDone:
    """All matrices of a block were shown; what leaves is let go of when the walk goes on."""

    block: Block
    before: Sequence[Tensor] = ()
    """Hidden states that the first block of the window was given, one tensor per batch, as far as the walk was asked to
    keep them."""
    after: Sequence[Tensor] = ()
    """What the dense block made of them: in `Dense` moves of the same inputs, else of the dense model's, if those go
    along (`Recording.dense`)."""
    earlier: Sequence[Block] = ()
    """Blocks before it that the walk still holds, so that they can be changed with it."""
    leaving: int = 1
    """So many blocks of the window, the first ones, are let go of when the walk goes on."""

    @property
    def window(self) -> list[Block]:
        """The blocks that can be changed, this one last."""
        return [*self.earlier, self.block]


@dataclass(frozen=True)
class Past:
    """What earlier runs left: nothing, unless it is said."""

    finished: Container[str] = ()
    """Names of blocks that an earlier run finished: their inputs move on, but they are not shown."""
    restore: Callable[[Block], None] = lambda block: None
    """Gives a finished block, or one that was still held, its pruned weights."""
    known: Known = field(default_factory=dict)
    """Reads what was gathered before of a block, by its name: the inputs of every group, by the group's first matrix.
    Such a block is not observed."""
    held: Container[str] = ()
    """Names of blocks after the finished ones that were shown, and held for a window when the earlier run ended."""


NO_PAST = Past()
