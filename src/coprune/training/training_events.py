"""Events of a training for the listeners of its reporter."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from coprune.base.progress import Event


class TrainingPhase(StrEnum):
    """The timed phases of a training, in order."""

    PREPARE = "load and measure before training"
    TRAIN = "train"
    FINISH = "measure and save the trained model"


@dataclass(frozen=True)
class TrainingPhaseDone(Event):
    """A phase of a training ended."""

    kind: ClassVar[str] = "training"
    phase: TrainingPhase
    seconds: float
    """Of this process, without those before a resume."""
