"""What the walk of a run is made of: its calibration batches, how they move on, and who solves which matrix."""

from __future__ import annotations

from coprune.base.words import Setting, say
from coprune.model.walk.moves import ByBlock, Dense, Moves, Sequential
from coprune.model.walk.recording import Recording
from coprune.model.walk.statistics import Gram
from coprune.pruning.pruner import Solving, SolvingAlone
from coprune.run.batches import counted_batches, record_counted
from coprune.run.session import Session
from coprune.run.share import SharedSolving

_MOST_PASSES = 5
"""Trainings on a sample beyond which more samples are advised: with 3 instead of 14, in as many steps, SmolLM2's KL to
dense was 8 % less at 2:4 and 4 % at 60 % on text like that of the calibration; on other text 4 % less, and 2 % more (LOG.md)."""


def moves_of(session: Session) -> Moves:
    """How the walk of a run moves its inputs on."""
    asked, keep = session.opened.recipe.calibration, session.reconstruction is not None
    if asked.propagation == "dense":
        return Dense()
    if asked.propagation == "sequential":
        return Sequential(keep)
    return ByBlock(keep)


def solving_of(session: Session) -> Solving:
    """Who prunes which matrix. In `sequential`, the matrices of a group are all that can be pruned at the same time."""
    processes = session.opened.around.processes
    if processes.size == 1:
        return SolvingAlone()
    sequential = session.opened.recipe.calibration.propagation == "sequential"
    outside = [[matrix] for matrix in session.model.chosen.outside]
    stages = [*session.model.structure.groups, outside]
    if sequential:
        stages = [[group] for groups in stages for group in groups]
    return SharedSolving(processes, stages, sequential, gram=session.opened.solver.statistic is Gram)


def record_to_prune(session: Session) -> Recording | None:
    """Record the calibration batches, with what else is aimed at beside them; says so where they are few to train blocks on."""
    trained = session.reconstruction
    recording = record_calibration(session, dense=trained is not None)
    if trained is not None and recording is not None:
        passes = trained.on(recording.positions).passes(recording.shares)
        if passes > _MOST_PASSES:
            told = f"Every block is trained on each sample {passes:.0f} times; a larger "
            session.opened.around.reporter.say(say((told, Setting("nsamples"), " may do better.")))
    return recording


def record_calibration(session: Session, dense: bool = False) -> Recording | None:
    """Record the calibration batches. dense: with the dense model's hidden states beside them, to aim at."""
    opened = session.opened
    if opened.samples is None:
        return None
    batches = counted_batches(opened.task, opened.recipe, opened.samples, opened.around.processes)
    recording = record_counted(session.model, batches, opened.activations(lists=1 + dense))
    if dense:
        recording.dense = recording.hidden.copy()
        if session.reconstruction is not None:
            recording.aims = session.reconstruction.on(recording.positions).batches_used(recording.shares)
    return recording
