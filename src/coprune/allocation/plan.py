"""Plan every matrix's target from one look at the dense model: a consumer of the walk that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coprune.allocation.base import Allocation, Shown, unit_name, units_of
from coprune.checkpoint.weights import Weights
from coprune.errors import BadInput
from coprune.gathering import Inputs
from coprune.model.blocks import Block
from coprune.model.matrices import Chosen
from coprune.model.prove import Structure
from coprune.patterns import Target
from coprune.recording import Recording
from coprune.walk import BlockDone, Walk


def plan_targets(
    allocation: Allocation,
    weights: Weights,
    blocks: Sequence[Block],
    chosen: Chosen,
    structure: Structure,
    recording: Recording | None,
    target: Target,
    reduce: Callable[[Inputs], None] = lambda inputs: None,
    advance: Callable[[float], None] = lambda blocks: None,
) -> dict[str, Target]:
    """Give every chosen matrix its target; all together have the sparsity of the overall one.

    recording: calibration batches of its own, since it moves their hidden states on; None for an allocation that needs
    no data. reduce, advance: as in `Walk`. Returns targets by name of matrix. Raises BadInput if the budget cannot be
    kept, NumericalError.
    """
    units = units_of(chosen, [block.name for block in blocks])
    sums: dict[str, Tensor] = {}
    if allocation.looks:
        if allocation.statistic is not None and recording is None:
            raise BadInput("this allocation looks at activations, so it needs calibration data.")
        walk = Walk(
            weights,
            blocks,
            chosen.blocks,
            allocation.statistic,
            structure,
            recording if allocation.statistic is not None else None,
            changes=False,
            outside=chosen.outside,
            reduce=reduce,
            advance=advance,
        )
        sums = _measure(allocation, walk, target)
    targets = allocation.allocate(units, sums, target)
    return {name: own for unit, own in zip(units, targets, strict=True) for name in unit.members}


@torch.no_grad()
def _measure(allocation: Allocation, walk: Walk, target: Target) -> dict[str, Tensor]:
    """What the allocation measured in every block, experts added up, by name of unit."""
    sums: dict[str, Tensor] = {}

    def measure(shown: list[Shown]) -> None:
        for name, found in allocation.measure(shown, target).items():
            unit = unit_name(name)
            sums[unit] = sums[unit] + found if unit in sums else found

    shown: list[Shown] = []
    for event in walk:
        if isinstance(event, BlockDone):
            measure(shown)
            shown = []
            continue
        statistic = None if event.inputs is None else event.inputs.statistic
        known = None if statistic is None or statistic.count == 0 else statistic
        shown += [(matrix, known) for matrix in event.matrices]
    # What is shown after the blocks is measured one by one, each a place of its own.
    for one in shown:
        measure([one])
    return sums
