"""What the walk of a run is made of: its calibration batches, how they move on, and who solves which matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from coprune.base.processes import ALONE, Processes
from coprune.base.words import Setting, say
from coprune.data import Windows
from coprune.evaluation.tasks import Samples, Task
from coprune.model.walk.activations import Activations
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.recording import ByBlock, Dense, Moves, Recording, Sequential, record_batches
from coprune.model.walk.statistics import Gram
from coprune.pruning.pruner import Solving, SolvingAlone
from coprune.recipe.recipe import Recipe
from coprune.run.session import Session
from coprune.run.share import SharedSolving
from coprune.run.stored_as import encoding_for

_MOST_PASSES = 5
"""Trainings on a sample beyond which more samples are advised: with 3 instead of 14, in as many steps, SmolLM2's KL to
dense was 8 % less at 2:4 and 4 % at 60 % on text like that of the calibration; on other text 4 % less, and 2 % more (LOG.md)."""


def moves_of(session: Session) -> Moves:
    """How the walk of a run moves its inputs on."""
    asked, keep = session.opened.recipe.calibrate, session.reconstruction is not None
    if asked.propagation == "dense":
        return Dense()
    if asked.propagation == "sequential":
        # What is rounded when a block is written is what the next block's inputs come from.
        return Sequential(keep or encoding_for(session.opened.recipe, session.model.weights).name == "source")
    return ByBlock(keep)


def solving_of(session: Session) -> Solving:
    """Who prunes which matrix. In `sequential`, the matrices of a group are all that can be pruned at the same time."""
    processes = session.opened.around.processes
    if processes.size == 1:
        return SolvingAlone()
    sequential = session.opened.recipe.calibrate.propagation == "sequential"
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


class Counted(NamedTuple):
    """One batch."""

    tokens: Tensor
    counted: Tensor | None
    """Which of its tokens count, B × S bool; None for all."""


def counted_batches(task: Task, recipe: Recipe, samples: Samples, processes: Processes = ALONE) -> list[Counted]:
    """This process's share of some samples, in batches."""
    own, marks = processes.share(samples.tokens), samples.generated if isinstance(samples, Windows) else None
    batches = task.batches(own)
    if recipe.calibrate.calibrate_on == "all" or marks is None:
        return [Counted(batch, None) for batch in batches]
    return [Counted(*pair) for pair in zip(batches, task.batches(own, processes.share(marks)), strict=True)]


def first_batches(batches: Iterable[Tensor], tokens: int) -> list[Tensor]:
    """The first batches that hold at least so many tokens; of images one."""
    some: list[Tensor] = []
    for batch in batches:
        some.append(batch)
        if batch.is_floating_point() or sum(one.numel() for one in some) >= tokens:
            break
    return some


def first_counted(batches: Sequence[Counted], tokens: int) -> Sequence[Counted]:
    """The first batches that hold at least so many tokens (of images one); all of them for 0."""
    return batches[: len(first_batches((batch.tokens for batch in batches), tokens))] if tokens else batches


def record_counted(model: ProvenModel, batches: Sequence[Counted], activations: Activations | None = None) -> Recording:
    """Record batches as `record_batches` does, of which only some tokens count."""
    recording = record_batches(model, [batch.tokens for batch in batches], activations)
    recording.counted = [batch.counted for batch in batches if batch.counted is not None] or None
    return recording
