"""The events of a walk, and the results of earlier runs that it reuses."""

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
    """Matrices whose inputs are complete, to prune (or inspect) now. Those of one event share their inputs."""

    matrices: list[Matrix]
    inputs: Inputs | None
    """None without calibration data."""

    def known(self) -> dict[str, Inputs]:
        """Return the statistics of each matrix's inputs, by its name."""
        return {} if self.inputs is None else dict.fromkeys((m.name for m in self.matrices), self.inputs)

    def statistics(self) -> dict[str, Statistic]:
        """Return the statistic of each matrix's inputs, by name; empty if no token was seen."""
        found = {name: inputs.statistic for name, inputs in self.known().items()}
        return {name: statistic for name, statistic in found.items() if statistic and statistic.count}


@dataclass(frozen=True)
class BlockDone:
    """All matrices of a block are done; it is released when the walk continues."""

    block: Block
    before: Sequence[Tensor] = ()
    """Its input hidden states, one tensor per batch, if the walk was asked to keep them."""
    after: Sequence[Tensor] = ()
    """The dense block's outputs: on the same inputs with `Dense` moves, else on the dense model's, if they are
    tracked (`Recording.dense`)."""


@dataclass(frozen=True)
class Past:
    """Results of earlier runs: none by default."""

    finished: Container[str] = ()
    """Names of finished blocks: inputs advance through them, but they yield no events."""
    restore: Callable[[Block], None] = lambda block: None
    """Restores a finished block's pruned weights."""
    known: Known = field(default_factory=dict)
    """Reads a block's stored inputs by the block's name: one for each group, by the group's first matrix. Such a block
    is not observed."""
    dense: Callable[[Block], AbstractContextManager[None]] = lambda block: nullcontext()
    """While open, restores the dense values of a block's parameters that are shared and already pruned."""


NO_PAST = Past()
