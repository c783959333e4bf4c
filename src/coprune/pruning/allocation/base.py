"""What an allocation is: it looks at every matrix once and spreads one budget of zeros over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor

from coprune.model.choosing import Chosen
from coprune.model.matrices import Matrix
from coprune.model.walk.statistics import Statistic
from coprune.recipe.pattern import Target

Shown = tuple[Matrix, Statistic | None]
"""A matrix of a block with the statistic of its inputs (None if none is asked for, or no token came to it)."""


@dataclass(frozen=True)
class Unit:
    """What gets one sparsity: a matrix, or all experts of one parameter."""

    name: str
    """Path of the parameter, without an expert's number."""
    place: str
    """Name of its block; its own name if it lies outside the blocks."""
    rows: int
    """Outputs, of all its matrices together."""
    width: int
    members: tuple[str, ...]
    """Names of its matrices."""

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.rows * self.width


class Allocation(Protocol):
    """A frozen dataclass whose fields are its hyperparameters."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    # Properties for the same reason as in Method; an allocation writes class variables.
    @property
    def looks(self) -> bool:
        """Whether it has to see the weights at all."""

    @property
    def statistic(self) -> type[Statistic] | None:
        """What it needs to know of the inputs; None if nothing."""

    @property
    def first(self) -> int:
        """How many calibration tokens it looks at, the first ones, in whole batches; 0: all."""

    def measure(self, shown: Sequence[Shown], target: Target) -> dict[str, Tensor]:
        """Look at the matrices of one block of the dense model, together.

        Args:
            shown: the block's matrices with the statistics of their inputs.
            target: the overall one.

        Returns:
            A vector of sums (float64) by name of matrix; sums of experts are added up. A matrix may be missing.
        """
        ...

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        """Give every unit its target, so that all together have the sparsity of the overall one.

        Args:
            units: all that are to be pruned.
            sums: what was measured, by name of unit.
            target: the overall one.

        Raises:
            BadInput: that cannot be.
        """
        ...


def units_of(chosen: Chosen, block_names: Sequence[str]) -> list[Unit]:
    """Gather the chosen matrices into units, in the order of the model."""
    members: dict[str, list[Matrix]] = {}
    places: dict[str, str] = {}
    for place, matrices in [*zip(block_names, chosen.blocks, strict=True), (None, chosen.outside)]:
        for matrix in matrices:
            name = unit_name(matrix.name)
            members.setdefault(name, []).append(matrix)
            places[name] = name if place is None else place
    return [
        Unit(
            name,
            places[name],
            sum(matrix.shape[0] for matrix in matrices),
            matrices[0].shape[1],
            tuple(matrix.name for matrix in matrices),
        )
        for name, matrices in members.items()
    ]


def targets_by_matrix(
    units: Sequence[Unit], targets: Sequence[Target], outputs: Mapping[str, Tensor]
) -> dict[str, Target]:
    """What every matrix gets, by its name.

    Args:
        units: all that are to be pruned.
        targets: a target for each.
        outputs: by how much a matrix's outputs count, by its name; those of others all alike.
    """
    each = zip(units, targets, strict=True)
    return {name: replace(own, outputs=outputs.get(name)) for unit, own in each for name in unit.members}


def unit_name(matrix_name: str) -> str:
    """The unit that a matrix belongs to."""
    return matrix_name.partition("[")[0]
