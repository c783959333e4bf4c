"""Plan every matrix's target from one look at the dense model: a consumer of the walk that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import scaled
from coprune.model.checkpoint.weights import require_in_memory
from coprune.model.walk.moves import Dense
from coprune.model.walk.proven import FoundModel
from coprune.model.walk.recording import Recording
from coprune.model.walk.shown import BlockDone
from coprune.model.walk.walk import Walk
from coprune.pruning.allocation.base import Allocation, Shown, targets_by_matrix, unit_name, units_of
from coprune.pruning.allocation.fisher import ByFisher
from coprune.pruning.allocation.slopes import Sample, lost_by_slopes, outputs_by_slopes, watch
from coprune.recipe.pattern import Target

TOKENS = 1024
_WALK = 0.3
"""The share of the time that the walk takes, where forwards and backwards of the whole model come after it."""


def plan_targets(
    allocation: Allocation,
    model: FoundModel,
    recording: Recording | None,
    target: Target,
    processes: Processes = ALONE,
    advance: Callable[[float], None] = lambda blocks: None,
) -> dict[str, Target]:
    """Give every chosen matrix its target; all together have the sparsity of the overall one.

    Args:
        allocation: spreads the sparsity.
        model: the model; proven, if the allocation needs data.
        recording: calibration batches of its own, since it moves their hidden states on; None if it needs none.
        target: of all matrices together.
        processes, advance: as in `Walk`.

    Returns:
        Targets by the name of the matrix.

    Raises:
        BadInput: if the budget cannot be kept.
        NumericalError: where the activations are not finite.
    """
    if allocation.statistic is None:
        recording = None
    elif recording is None:
        raise BadInput("this allocation looks at activations, so it needs calibration data", field="allocation")
    sums: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    if isinstance(allocation, ByFisher):
        assert recording is not None
        sums, outputs = _by_slopes(allocation, model, recording, target, processes, advance)
    elif allocation.looks:
        sums = _by_looks(allocation, model, recording, target, processes, advance)
    units = units_of(model.chosen, model.names)
    return targets_by_matrix(units, allocation.allocate(units, sums, target), outputs)


def _by_slopes(
    allocation: ByFisher,
    model: FoundModel,
    recording: Recording,
    target: Target,
    processes: Processes,
    advance: Callable[[float], None],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What every unit loses, from one look for the masks and then forwards and backwards of the whole model.

    Returns:
        That, by name of unit; by how much each matrix's outputs count, by its name, if that is asked for.
    """
    require_in_memory(model.weights, "allocation")
    samples = _samples(recording)
    squares = _by_looks(allocation, model, recording, target, processes, scaled(advance, _WALK))
    watched = watch(allocation, model.chosen, squares, target)
    lost = lost_by_slopes(model, watched, samples, processes, scaled(advance, (1 - _WALK) * len(model.blocks)))
    return lost, outputs_by_slopes(watched, allocation.outputs)


def _by_looks(
    allocation: Allocation,
    model: FoundModel,
    recording: Recording | None,
    target: Target,
    processes: Processes,
    advance: Callable[[float], None],
) -> dict[str, Tensor]:
    """What the allocation measured of every unit in one walk."""
    keep = None
    if allocation.asks_movement and recording is not None:
        keep = partial(some_tokens, batches=len(recording.hidden), total=recording.uneven)
    walk = Walk(model, recording, allocation.statistic, Dense(keep=keep), processes=processes, advance=advance)
    return _measure(allocation, walk, target, keep)


def _samples(recording: Recording) -> list[Sample]:
    """The recorded samples one by one, with which of their tokens count."""
    found: list[Sample] = []
    for batch, tokens in enumerate(recording.tokens):
        marks = [None] * len(tokens) if recording.counted is None else recording.counted[batch].split(1)
        found += zip(tokens.split(1), marks, strict=True)
    return found


@torch.no_grad()
def _measure(
    allocation: Allocation, walk: Walk, target: Target, keep: Callable[[Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """What the allocation measured in every block, experts added up, by name of unit.

    keep: some rows of hidden states; None where it does not ask how much blocks move.
    """
    sums: dict[str, Tensor] = {}

    def measure(shown: list[Shown], moved: float) -> None:
        for name, found in allocation.measure(shown, moved, target).items():
            unit = unit_name(name)
            sums[unit] = sums[unit] + found if unit in sums else found

    shown: list[Shown] = []
    for event in walk:
        if isinstance(event, BlockDone):
            after = [] if keep is None else [keep(hidden) for hidden in event.after]
            measure(shown, 1.0 if keep is None else movement(joined(event.before), joined(after), walk.processes))
            shown = []
            continue
        statistic = None if event.inputs is None else event.inputs.statistic
        known = None if statistic is None or statistic.count == 0 else statistic
        shown += [(matrix, known) for matrix in event.matrices]
    # What is shown after the blocks is measured one by one, each a place of its own.
    for one in shown:
        measure([one], 1.0)
    return sums


def some_tokens(hidden: Tensor, batches: int, total: int | None = None) -> Tensor:
    """Rows of one batch's hidden states (N × H float32), about a thousand of all batches; of models of images, whole
    samples. Each of several processes has its own.

    total: rows of all batches, where they hold different numbers of them (`Recording.uneven`).
    """
    rows = hidden.reshape(-1, hidden.shape[-1]) if hidden.ndim == 3 else hidden.flatten(1)
    per_batch = -(-TOKENS // batches) if total is None else -(-TOKENS * len(rows) // total)
    step = max(1, len(rows) // per_batch)
    return rows[step // 2 :: step][:per_batch].to(torch.float32, copy=True)


def joined(rows: Sequence[Tensor]) -> Tensor | None:
    """All rows as one tensor; None where there are none."""
    return torch.cat(list(rows)) if len(rows) else None


def movement(before: Tensor | None, after: Tensor | None, processes: Processes = ALONE) -> float:
    """How much a block changes the hidden states: ‖after − before‖² / ‖after‖², mean over rows.

    By rows, because the first token of many models is a thousand times larger than the rest.

    Args:
        before: N × H.
        after: N × H.
        processes: those that go through the block together, each with rows of its own.

    Returns:
        1 where that means nothing: without data, or where a block changes their shape.
    """
    found = processes.gather(_changes(before, after))
    rows = sum(number for _, number in found)
    return sum(change for change, _ in found) / rows if rows else 1.0


def _changes(before: Tensor | None, after: Tensor | None) -> tuple[float, int]:
    """What `movement` says of each row, added up, and of how many rows that is."""
    if before is None or after is None or before.shape != after.shape:
        return 0.0, 0
    size = after.square().sum(dim=1)
    change = (after - before).square().sum(dim=1)
    return float((change / size.clamp_min(1e-30)).double().sum()), len(after)
