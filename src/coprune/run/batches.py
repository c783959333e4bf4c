"""Calibration samples as they run through a model: in batches, with which of their tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from coprune.base.processes import ALONE, Processes
from coprune.data import Windows
from coprune.evaluation.tasks import Samples, Task
from coprune.model.walk.activations import Activations
from coprune.model.walk.proven import ProvenModel
from coprune.model.walk.recording import Recording, record_batches
from coprune.pruning.structure.blocks import first_batches
from coprune.recipe.recipe import Recipe


class Counted(NamedTuple):
    """One batch."""

    tokens: Tensor
    counted: Tensor | None
    """Which of its tokens count, B × S bool; None for all."""


def counted_batches(task: Task, recipe: Recipe, samples: Samples, processes: Processes = ALONE) -> list[Counted]:
    """This process's share of some samples, in batches."""
    own, marks = processes.share(samples.tokens), samples.generated if isinstance(samples, Windows) else None
    batches = task.batches(own)
    if recipe.calibration.calibrate_on == "all" or marks is None:
        return [Counted(batch, None) for batch in batches]
    return [Counted(*pair) for pair in zip(batches, task.batches(own, processes.share(marks)), strict=True)]


def first_counted(batches: Sequence[Counted], tokens: int) -> Sequence[Counted]:
    """The first batches that hold at least so many tokens (of images one); all of them for 0."""
    return batches[: len(first_batches((batch.tokens for batch in batches), tokens))] if tokens else batches


def record_counted(model: ProvenModel, batches: Sequence[Counted], activations: Activations | None = None) -> Recording:
    """Record batches as `record_batches` does, of which only some tokens count."""
    recording = record_batches(model, [batch.tokens for batch in batches], activations)
    recording.counted = [batch.counted for batch in batches if batch.counted is not None] or None
    return recording
