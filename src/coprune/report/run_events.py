"""Notable events of a run as records, with their texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from coprune.base.words import Setting, say
from coprune.model.checkpoint.formats import Rounding
from coprune.model.leftovers import LeftOut, NotLoaded
from coprune.pruning.block_training import BlockTraining
from coprune.pruning.solver_events import Event, Kind

_WORDS: dict[Kind, str] = {
    "no tokens": "it received no calibration tokens, so it was pruned by magnitude",
    "only zeros": "its inputs were all zero, so it was pruned by magnitude",
    "few tokens": "only {tokens:g} tokens for {inputs:g} inputs; the statistics were completed with the layer's average",
    "damping raised": "the Cholesky factorisation failed; damping raised to {damping:g}",
    "eigenvalues clipped": "the Cholesky factorisation failed at every damping; eigenvalues clipped from below in float64",
    "mask unsettled": "the mask was still changing after {rounds:g} rounds",
    "sparsity missed": "the sparsity is {reached:.4f} instead of {asked:.4f}",
}


def event_line(event: Event) -> str:
    """Return an event of a matrix in words."""
    return event.note or _WORDS.get(event.kind, event.kind).format_map(event.figures)


class RunEvent(BaseModel):
    """A repair or limitation of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def line(self) -> str:
        """Return the event in words."""


class OfMatrix(RunEvent):
    """An event of one matrix."""

    matrix: str
    event: Event

    def line(self) -> str:
        return f"{self.matrix}: {event_line(self.event)}"


class ResumedOtherwise(RunEvent):
    """A setting that affects the last bits and differs from the earlier run whose blocks this one reused."""

    setting: str
    before: Any
    now: Any

    @property
    def change(self) -> str:
        """The two values in words."""
        return f"{self.setting} was {self.before!r} and is {self.now!r}"

    def line(self) -> str:
        return f"Blocks of an earlier run differ in last bits: {self.change}"


class Rounded(RunEvent):
    """Weights that were rounded to values of the source's format."""

    weights: int
    relative: float
    """Root mean square of the change."""

    @classmethod
    def of(cls, rounding: Rounding) -> Rounded | None:
        """Return the event, or None if nothing was rounded."""
        relative = (rounding.error / rounding.energy) ** 0.5 if rounding.energy else 0.0
        return cls(weights=rounding.values, relative=relative) if rounding.values else None

    def line(self) -> str:
        by = f"by {self.relative:.2%} (root mean square)"
        return f"{self.weights:,} weights were rounded to values of the source's format, {by}"


class IdleTrainings(RunEvent):
    """Block trainings that gained nothing."""

    idle: int
    blocks: int

    @classmethod
    def of(cls, trainings: Sequence[BlockTraining]) -> IdleTrainings | None:
        """Return the event, or None if less than a third gained nothing."""
        idle = sum(training.is_idle for training in trainings)
        return cls(idle=idle, blocks=len(trainings)) if idle and 3 * idle >= len(trainings) else None

    def line(self) -> str:
        gained = f"The training of {self.idle} of {self.blocks} blocks gained nothing"
        return say((f"{gained}. A smaller ", Setting("reconstruct_lr"), " may"))


LeftAlone = LeftOut | NotLoaded
"""Layers and tensors that a run does not change."""
_MOST_NOT_LOADED = 30


def left_lines(left: Sequence[LeftAlone]) -> list[str]:
    """Describe what is left unchanged, listing only the most frequent tensors that are not loaded."""
    loaded = [str(one) for one in left if not isinstance(one, NotLoaded)]
    others = [str(one) for one in left if isinstance(one, NotLoaded)]
    more = len(others) - _MOST_NOT_LOADED
    return [*loaded, *others[:_MOST_NOT_LOADED], *([f"{more:,} more kinds of such tensors"] if more > 0 else [])]


AnyEvent = OfMatrix | ResumedOtherwise | Rounded | IdleTrainings
