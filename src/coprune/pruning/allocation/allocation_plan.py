"""Planning of every matrix's target from one pass over the dense model, which it does not change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import scaled
from coprune.model.checkpoint.weights import require_in_memory
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.model_structure import FoundModel
from coprune.model.walk.recording import Dense, Recording
from coprune.model.walk.walk import Walk
from coprune.pruning.allocation.allocation import Allocation, Shown, targets_by_matrix, unit_name, units_of
from coprune.pruning.allocation.fisher import ByFisher, Sample, losses_by_gradients, output_weights, watch
from coprune.recipe.pattern import Target

_WALK = 0.3
"""Share of the time taken by the walk if forward and backward passes of the whole model follow it."""


def plan_targets(
    allocation: Allocation,
    model: FoundModel,
    recording: Recording | None,
    target: Target,
    processes: Processes = ALONE,
    advance: Callable[[float], None] = lambda blocks: None,
) -> dict[str, Target]:
    """Allocate a target to each chosen matrix so that together they have the overall sparsity.

    With an allocation that measures blocks, matrices shared by several blocks get the overall sparsity.

    Args:
        allocation: the allocation.
        model: the model; must be proven if the allocation needs data.
        recording: calibration batches of its own, whose hidden states it advances; None if it needs none.
        target: the overall target.
        processes, advance: as in `Walk`.

    Returns:
        Targets by the name of the matrix.

    Raises:
        BadInput: the overall sparsity cannot be reached.
        NumericalError: the activations are not finite.
    """
    if allocation.statistic is None:
        recording = None
    elif recording is None:
        raise BadInput("this allocation needs calibration data", field="allocation")
    sums: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    if isinstance(allocation, ByFisher):
        assert recording is not None
        sums, outputs = _by_gradients(allocation, model, recording, target, processes, advance)
    elif allocation.measures:
        sums = _by_walk(allocation, model, recording, target, processes, advance)
    units = units_of(model.chosen, model.names, shared=not allocation.measures)
    shared = dict.fromkeys((uses[0].name for uses in model.chosen.several), target)
    return shared | targets_by_matrix(units, allocation.allocate(units, sums, target), outputs)


def _by_gradients(
    allocation: ByFisher,
    model: FoundModel,
    recording: Recording,
    target: Target,
    processes: Processes,
    advance: Callable[[float], None],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measure each unit's loss: one walk for the masks, then forward and backward passes of the whole model.

    Returns:
        The losses by name of unit; the weights of outputs by name of matrix, if requested.
    """
    require_in_memory(model.weights, "allocation")
    samples = _samples(recording)
    squares = _by_walk(allocation, model, recording, target, processes, scaled(advance, _WALK))
    watched = watch(allocation, model.chosen, squares, target)
    lost = losses_by_gradients(model, watched, samples, processes, scaled(advance, (1 - _WALK) * len(model.blocks)))
    return lost, output_weights(watched, allocation.outputs)


def _by_walk(
    allocation: Allocation,
    model: FoundModel,
    recording: Recording | None,
    target: Target,
    processes: Processes,
    advance: Callable[[float], None],
) -> dict[str, Tensor]:
    """Measure each unit in one walk."""
    walk = Walk(model, recording, allocation.statistic, Dense(), processes=processes, advance=advance)
    return _measure(allocation, walk, target)


def _samples(recording: Recording) -> list[Sample]:
    """Return the recorded samples one by one, with the masks of counted tokens."""
    found: list[Sample] = []
    for batch, tokens in enumerate(recording.tokens):
        marks = [None] * len(tokens) if recording.counted is None else recording.counted[batch].split(1)
        found += zip(tokens.split(1), marks, strict=True)
    return found


@torch.no_grad()
def _measure(allocation: Allocation, walk: Walk, target: Target) -> dict[str, Tensor]:
    """Measure each block and add up experts, by name of unit."""
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
    # Matrices after the blocks are measured one by one.
    for one in shown:
        measure([one])
    return sums
