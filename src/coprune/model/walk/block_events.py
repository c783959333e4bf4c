"""The events of a walk, and the results of earlier runs that it takes over."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from coprune.model.blocks import Block
from coprune.model.matrices import Matrix
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.statistics import Statistic

OUTSIDE = "outside"
"""Key in `Past.known` of the matrices after the blocks."""
Known = Mapping[str, Callable[[], dict[str, Inputs]]]


@dataclass(frozen=True)
class MatricesReady:
    """Matrices whose inputs are known, to be pruned (or looked at) now. Those of one event share their inputs."""

    matrices: list[Matrix]
    inputs: Inputs | None
    """None where no calibration data runs through the model."""

    def known(self) -> dict[str, Inputs]:
        """Return the statistics of each matrix's inputs, by its name."""
        return {} if self.inputs is None else dict.fromkeys((m.name for m in self.matrices), self.inputs)

    def statistics(self) -> dict[str, Statistic]:
        """Return the statistic of each matrix's inputs, by name; empty if no token was seen."""
        found = {name: inputs.statistic for name, inputs in self.known().items()}
        return {name: statistic for name, statistic in found.items() if statistic and statistic.count}


@dataclass(frozen=True)
class BlockDone:
    """The end of a block's matrices; the block is released when the walk continues."""

    block: Block
    before: Sequence[Tensor] = ()
    """Hidden states that it was given, one tensor per batch, as far as the walk was asked to keep them."""
    after: Sequence[Tensor] = ()
    """The dense block's outputs: in `Dense` moves of the same inputs, else of the dense model's, if those go
    along (`Recording.dense`)."""


@dataclass(frozen=True)
class Past:
    """Blocks that earlier runs finished: none by default."""

    finished: Container[str] = ()
    """Names of blocks that an earlier run finished: their inputs move on, but they are not shown."""
    restore: Callable[[Block], None] = lambda block: None
    """Gives a finished block its pruned weights."""
    known: Known = field(default_factory=dict)
    """Reads what was gathered before of a block, by its name: the inputs of every group, by the group's first matrix.
    Such a block is not observed."""
    dense: Callable[[Block], AbstractContextManager[None]] = lambda block: nullcontext()
    """While open, gives a block the dense model's values of what it shares with others and was pruned before."""


NO_PAST = Past()
