"""What a run decides from one look at the dense model, before it prunes: every matrix's target, the order of channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coprune.base.progress import NO_BAR
from coprune.base.words import per_cent
from coprune.model.checkpoint.names import is_below
from coprune.model.matrices import LEAST_SPARSITY, Matrix
from coprune.model.matrix_choice import Chosen
from coprune.model.walk.recording import Recording
from coprune.pruning.allocation import allocation_named
from coprune.pruning.allocation.allocation_plan import plan_targets
from coprune.pruning.permutation import permute_model
from coprune.pruning.rotation import rotate_model
from coprune.recipe.pattern import Target
from coprune.run.calibrating import counted_batches, first_counted, record_counted
from coprune.run.session import Session

_TOKENS_TO_TURN = 2048
"""Norms of inputs are looked at, and Gram matrices of single heads, which are narrow: so few tokens tell all of them."""
Record = Callable[[], Recording | None]
"""Records the calibration batches anew, since every walk moves their hidden states on."""


def look_at_dense(session: Session, record: Record) -> Callable[[Matrix], Target]:
    """Permute channels and allocate the sparsity, as the recipe says; returns which target a matrix has.

    All processes of a run call this together. Raises BadInput, NumericalError.
    """
    opened, model = session.opened, session.model
    recipe, reporter, processes = opened.recipe, opened.around.reporter, opened.around.processes
    # In this order, since values are turned for the groups in which inputs stand.
    if recipe.prune.permute:
        _permute(session)
    if recipe.prune.rotate:
        _rotate(session)
    allocation, recording = allocation_named(recipe.prune.allocation), None
    if allocation.statistic is not None:
        recording = _record_few(session, allocation.first) if allocation.first else record()
    bar = reporter.bar("Allocating sparsity", len(model.blocks)) if allocation.looks else NO_BAR
    with bar as advance:
        targets = plan_targets(allocation, model, recording, opened.target, processes, advance)
    targets = processes.from_first(lambda: targets)
    if recipe.prune.allocation.name != "uniform":
        reporter.say(f"Allocation {recipe.prune.allocation}: {describe_targets(model.chosen, targets)}")
    return lambda matrix: targets[matrix.name]


def pruned_before(session: Session) -> str | None:
    """What to say of a model that is sparse already, as its first block tells; None of a dense one."""
    model, block = session.model, session.model.blocks[0]
    matrices = [matrix for matrix in model.chosen.all() if is_below(matrix.name, block.name)]
    model.weights.acquire(block.name)
    zeros = sum(matrix.zeros() for matrix in matrices)
    share = zeros / max(1, sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices))
    model.weights.release(block.name)
    if share < LEAST_SPARSITY:
        return None
    said = (
        f"{session.opened.loaded.source} was pruned before: {per_cent(share)} of the weights of {block.name} are zero"
    )
    return f"{said}. What is called dense in the report is the model as it comes."


def describe_targets(chosen: Chosen, targets: Mapping[str, Target]) -> str:
    """The range of the planned sparsities, and the overall one, for people."""
    sizes = {matrix.name: matrix.shape[0] * matrix.shape[1] for matrix in chosen.all()}
    overall = sum(targets[name].sparsity * size for name, size in sizes.items()) / sum(sizes.values())
    sparsities = [target.sparsity for target in targets.values()]
    return (
        f"matrices from {per_cent(min(sparsities))} to {per_cent(max(sparsities))} sparse, {per_cent(overall)} in all."
    )


def _permute(session: Session) -> None:
    opened, recording = session.opened, _record_few(session, _TOKENS_TO_TURN)
    reporter, processes = opened.around.reporter, opened.around.processes
    with reporter.bar("Permuting channels", len(session.model.blocks)) as advance:
        permuted = permute_model(
            session.model, recording, opened.solver.method, opened.target.pattern, processes, advance
        )
    reporter.say(permuted.describe())


def _rotate(session: Session) -> None:
    opened, recording = session.opened, _record_few(session, _TOKENS_TO_TURN)
    reporter = opened.around.reporter
    with reporter.bar("Rotating values", len(session.model.blocks)) as advance:
        rotated = rotate_model(session.model, recording, opened.target, opened.around.processes, advance)
    reporter.say(rotated.describe())


def _record_few(session: Session, tokens: int) -> Recording:
    """Record the first calibration batches that hold so many tokens."""
    opened = session.opened
    assert opened.samples is not None
    batches = counted_batches(opened.task, opened.recipe, opened.samples, opened.around.processes)
    return record_counted(session.model, first_counted(batches, tokens))
