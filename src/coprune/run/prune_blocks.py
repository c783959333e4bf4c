"""The walk of a run: record its calibration batches, prune block by block, write what is finished.

What comes before and after, loading, measuring and saving, is in stages.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coprune.base.devices import memory_within
from coprune.base.memory import freed_memory_kept
from coprune.base.words import Setting, say
from coprune.model.blocks import Block
from coprune.model.checkpoint.writer import REST
from coprune.model.edit import AddLowRank, Edit, FillZeros
from coprune.model.edits import Edits
from coprune.model.matrices import Matrix
from coprune.model.walk.block_events import BlockDone, Past
from coprune.model.walk.walk import Walk
from coprune.pruning.block_training import idle_trainings, reconstruct_block
from coprune.pruning.pruner import MatrixResult, prune_walk
from coprune.recipe.pattern import Target
from coprune.recipe.recipe import Recipe
from coprune.run.calibrating import moves_of, record_calibration, record_to_prune, solving_of
from coprune.run.events import BlockPruned
from coprune.run.journal import BlockOutcome, Output
from coprune.run.look_at_dense import look_at_dense
from coprune.run.session import Reuse, Session
from coprune.run.share import SharedOutput


@dataclass(frozen=True)
class Outcome:
    """What the walk of a run did."""

    results: list[MatrixResult]
    """Of every matrix of the source that was pruned."""
    edits: Edits
    seconds: float
    covered: Mapping[str, float] = field(default_factory=dict)
    """What share of its experts' score every domain keeps, where experts were removed."""
    notes: Sequence[str] = ()
    """What is to be known of it beside the results."""


@freed_memory_kept()
def prune_blocks(session: Session, output: Output | None, reuse: Reuse) -> Outcome:
    """Walk over the blocks and prune them, going on where an earlier run stopped."""
    opened, model = session.opened, session.model
    recipe, reporter = opened.recipe, opened.around.reporter
    shared = SharedOutput(opened.around.processes, output, model.weights)
    finished = shared.finished()
    if finished:
        reporter.say(f"{len(finished)} of {len(model.blocks)} blocks were finished by an earlier run.")
    notes = [f"Blocks of an earlier run differ in last bits: {change}" for change in shared.changes if finished]
    for note in notes:
        reporter.say(f"{note}.")
    started = time.perf_counter()
    target_of = look_at_dense(session, lambda: record_calibration(session, dense=False))
    known = reuse.gathered(session, finished, lambda: record_calibration(session, dense=False))
    with reporter.bar(f"Pruning with {recipe.prune.method.name}", len(model.blocks)) as advance:
        # In `dense` propagation nothing has to run through blocks that are all known.
        recording = None if recipe.calibrate.propagation == "dense" and known else record_to_prune(session)
        walk = Walk(
            model,
            recording,
            opened.solver.statistic,
            moves_of(session),
            Past(finished, shared.restore, known),
            opened.around.processes,
            advance,
        )
        with shared.settled(), memory_within(lambda: walk.at):
            results = _prune(session, walk, shared, target_of)
    earlier = [result for outcome in finished.values() for result in outcome.results]
    if (idle := _idle_trainings(recipe, earlier + results)) is not None:
        reporter.say(idle)
        notes.append(idle)
    outside = {matrix.name for matrix in model.chosen.outside}
    rest = FillZeros(masks=_masks(result for result in results if result.name in outside))
    edits = all_edits(session, shared, rest)
    return Outcome(earlier + results, edits, time.perf_counter() - started, notes=notes)


def finish_block(session: Session, shared: SharedOutput, block: Block, outcome: BlockOutcome) -> None:
    """Let a block be what its edits make of it, write it, and tell of it."""
    for edit in outcome.edits:
        edit.apply(block.module)
    shared.write_block(block, outcome)
    session.opened.around.reporter.tell(BlockPruned(block.name, tuple(outcome.results)))


def all_edits(session: Session, shared: SharedOutput, *rest: Edit) -> Edits:
    """What was done to the whole model, when all its blocks are finished. rest: to what lies outside them."""
    return Edits({name: shared.outcomes[name].edits for name in session.model.names} | {REST: [*rest]})


def _prune(
    session: Session, walk: Walk, shared: SharedOutput, target_of: Callable[[Matrix], Target]
) -> list[MatrixResult]:
    """Prune what the walk shows; blocks are trained, if that is asked for, and written when they are finished."""
    opened = session.opened

    def block_done(done: BlockDone, results: list[MatrixResult]) -> list[MatrixResult]:
        if session.reconstruction is not None and walk.recording is not None:
            results = reconstruct_block(session.reconstruction, done, walk.recording, results)
        finish_block(session, shared, done.block, BlockOutcome(results, edits_of(results)))
        return results

    return prune_walk(
        walk,
        opened.solver,
        target_of,
        opened.recipe.evaluate.layer_error,
        block_done,
        solving_of(session),
    )


def _idle_trainings(recipe: Recipe, results: Sequence[MatrixResult]) -> str | None:
    """What to say where the training of a third of the blocks gained nothing."""
    idle, trainings = idle_trainings(results)
    if not idle or 3 * idle < trainings:
        return None
    smaller = ("A smaller ", Setting("reconstruct_lr"), " may.")
    return say((f"The training of {idle} of {trainings} blocks gained nothing. ", *smaller))


def edits_of(results: Sequence[MatrixResult]) -> list[Edit]:
    """What was done to a block whose matrices were pruned."""
    ranks = {result.name: result.rank for result in results if result.rank is not None}
    return [FillZeros(masks=_masks(results)), *([AddLowRank(ranks=ranks)] if ranks else [])]


def _masks(results: Iterable[MatrixResult]) -> dict[str, str]:
    return {result.name: result.mask_checksum for result in results}
