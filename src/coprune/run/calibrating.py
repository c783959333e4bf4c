"""The calibration batches of a run's walk, and how they move from block to block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from coprune.base.processes import ALONE, Processes
from coprune.base.words import Setting, say
from coprune.data.windows import Samples
from coprune.evaluation.tasks import Task
from coprune.model.walk.activations import Activations
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.recording import ByBlock, Dense, Moves, Recording, Sequential, record_batches
from coprune.recipe.recipe import Recipe
from coprune.run.context import Run

_MOST_PASSES = 5
"""Passes over each sample in block training above which more samples are advised, since they generalise better."""


def moves_of(run: Run) -> Moves:
    """Return how a run's walk moves its inputs from block to block."""
    asked, keep = run.recipe.calibrate, run.reconstruction is not None
    if asked.propagation == "dense":
        return Dense()
    if asked.propagation == "sequential":
        # The next block's inputs must come from the rounded weights.
        return Sequential(keep or run.encoding.name == "source")
    return ByBlock(keep)


def record_to_prune(run: Run) -> Recording | None:
    """Record the calibration batches and any training targets; advise more samples if they are few for block training."""
    trained = run.reconstruction
    recording = record_calibration(run, dense=trained is not None)
    if trained is not None and recording is not None:
        passes = trained.on(recording.positions).passes(recording.shares)
        if passes > _MOST_PASSES:
            told = f"Every block is trained on each sample {passes:.0f} times; a larger "
            run.reporter.say(say((told, Setting("nsamples"), " may do better.")))
    return recording


def record_calibration(run: Run, dense: bool = False) -> Recording | None:
    """Record the calibration batches. dense: also record the dense model's hidden states as targets."""
    if run.samples is None:
        return None
    batches = counted_batches(run.task, run.recipe, run.samples, run.processes)
    recording = record_counted(run.model, batches, run.activations(lists=1 + dense))
    if dense:
        recording.dense = recording.hidden.copy()
        if run.reconstruction is not None:
            recording.aims = run.reconstruction.on(recording.positions).batches_used(recording.shares)
    return recording


class Counted(NamedTuple):
    """A batch and its counted tokens."""

    tokens: Tensor
    counted: Tensor | None
    """Mask of the counted tokens, B × S bool; None for all."""


def counted_batches(task: Task, recipe: Recipe, samples: Samples[Any], processes: Processes = ALONE) -> list[Counted]:
    """Return this process's share of the samples, as batches."""
    own, marks = processes.share(samples.tokens), samples.generated
    batches = task.inputs.batches(own)
    if recipe.calibrate.calibrate_on == "all" or marks is None:
        return [Counted(batch, None) for batch in batches]
    return [Counted(*pair) for pair in zip(batches, task.inputs.batches(own, processes.share(marks)), strict=True)]


def first_batches(batches: Iterable[Tensor], tokens: int) -> list[Tensor]:
    """Return the first batches that hold at least `tokens` tokens; for images, one batch."""
    some: list[Tensor] = []
    for batch in batches:
        some.append(batch)
        if batch.is_floating_point() or sum(one.numel() for one in some) >= tokens:
            break
    return some


def first_counted(batches: Sequence[Counted], tokens: int) -> Sequence[Counted]:
    """Return the first batches that hold at least `tokens` tokens (for images, one batch); all for 0."""
    return batches[: len(first_batches((batch.tokens for batch in batches), tokens))] if tokens else batches


def record_counted(model: ProvenModel, batches: Sequence[Counted], activations: Activations | None = None) -> Recording:
    """Record batches like `record_batches`, with masks of the counted tokens."""
    recording = record_batches(model, [batch.tokens for batch in batches], activations)
    recording.counted = [batch.counted for batch in batches if batch.counted is not None] or None
    return recording
