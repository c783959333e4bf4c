"""Plan every matrix's target from one look at the dense model: a consumer of the walk that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.model.blocks import Block
from coprune.model.checkpoint.weights import Weights
from coprune.model.matrices import Chosen
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.prove import Structure
from coprune.model.walk.recording import Recording
from coprune.model.walk.walk import BlockDone, Walk
from coprune.pruning.allocation.base import Allocation, Shown, unit_name, units_of
from coprune.recipe.pattern import Target

TOKENS = 1024


def plan_targets(
    allocation: Allocation,
    weights: Weights,
    blocks: Sequence[Block],
    chosen: Chosen,
    structure: Structure | None,
    recording: Recording | None,
    target: Target,
    reduce: Callable[[Inputs], None] = lambda inputs: None,
    advance: Callable[[float], None] = lambda blocks: None,
) -> dict[str, Target]:
    """Give every chosen matrix its target; all together have the sparsity of the overall one.

    structure, recording: what the proof showed, and calibration batches of its own, since it moves their hidden states
    on; None for an allocation that needs no data. reduce, advance: as in `Walk`. Returns targets by name of matrix.
    Raises BadInput if the budget cannot be kept, NumericalError.
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

    def measure(shown: list[Shown], moved: float) -> None:
        for name, found in allocation.measure(shown, moved, target).items():
            unit = unit_name(name)
            sums[unit] = sums[unit] + found if unit in sums else found

    shown: list[Shown] = []
    before = _some_tokens(walk.recording)
    for event in walk:
        if isinstance(event, BlockDone):
            after = _some_tokens(walk.recording)
            measure(shown, movement(before, after))
            shown, before = [], after
            continue
        statistic = None if event.inputs is None else event.inputs.statistic
        known = None if statistic is None or statistic.count == 0 else statistic
        shown += [(matrix, known) for matrix in event.matrices]
    # What is shown after the blocks is measured one by one, each a place of its own.
    for one in shown:
        measure([one], 1.0)
    return sums


def _some_tokens(recording: Recording | None) -> Tensor | None:
    """Hidden states of about a thousand tokens, evenly spaced over all batches; of other models, of all samples.

    N × H, on the first process of several only its own, whose plan counts for all. None without data.
    """
    if recording is None or not len(recording.hidden):
        return None
    per_batch = -(-TOKENS // len(recording.hidden))
    found = []
    for hidden in recording.hidden:
        rows = hidden.reshape(-1, hidden.shape[-1]) if hidden.ndim == 3 else hidden.flatten(1)
        step = max(1, len(rows) // per_batch)
        found.append(rows[step // 2 :: step][:per_batch].to(torch.float32, copy=True))
    return torch.cat(found)


def movement(before: Tensor | None, after: Tensor | None) -> float:
    """How much a block changes the hidden states: ‖after − before‖² / ‖after‖², mean over rows.

    before, after: N × H. 1 where that means nothing: without data, or where a block changes their shape. By rows,
    because the first token of many models is a thousand times larger than the rest.
    """
    if before is None or after is None or before.shape != after.shape:
        return 1.0
    size = after.square().sum(dim=1)
    change = (after - before).square().sum(dim=1)
    return float((change / size.clamp_min(1e-30)).mean())
