"""Events of a run for its reporter's listeners: logs, trackers, sweeps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from coprune.base.progress import Event
from coprune.pruning.block_training import BlockTraining
from coprune.pruning.pruner import MatrixResult
from coprune.recipe.recipe import Recipe
from coprune.report.schema import PhaseFacts


class Phase(StrEnum):
    """The timed phases of a run, in order, as named in reports."""

    PREPARE = "load and prepare"
    MEASURE_DENSE = "measure the dense model"
    PRUNE = "prune"
    MEASURE_PRUNED = "measure the pruned model"
    SAVE = "save, reload and compare"


@dataclass(frozen=True)
class Started(Event):
    """A run began."""

    kind: ClassVar[str] = "started"
    recipe: Recipe

    def facts(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(mode="json")}


@dataclass(frozen=True)
class PhaseDone(Event):
    """A phase ended."""

    kind: ClassVar[str] = "phase"
    phase: Phase
    measured: PhaseFacts
    """Time and memory of the phase."""

    def facts(self) -> dict[str, Any]:
        return self.measured.model_dump()


@dataclass(frozen=True)
class BlockPruned(Event):
    """A block was pruned and written."""

    kind: ClassVar[str] = "block"
    block: str
    matrices: tuple[MatrixResult, ...]
    """Results of its matrices."""
    training: BlockTraining | None = None

    def facts(self) -> dict[str, Any]:
        matrices = [result.model_dump(mode="json", exclude={"distributions"}) for result in self.matrices]
        facts: dict[str, Any] = {"block": self.block, "matrices": matrices}
        return facts if self.training is None else facts | {"training": self.training.model_dump(mode="json")}


@dataclass(frozen=True)
class Finished(Event):
    """A run finished with a report."""

    kind: ClassVar[str] = "finished"
    figures: dict[str, float]
    """Measurements by name."""


@dataclass(frozen=True)
class Failed(Event):
    """A run ended without a report."""

    kind: ClassVar[str] = "failed"
    error: str
