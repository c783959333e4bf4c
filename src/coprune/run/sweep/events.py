"""What happens to the jobs of a sweep, as their workers tell it; plain values, which pass between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from coprune.base.errors import CopruneError


@dataclass(frozen=True)
class Doing:
    """What a job does now."""

    run: str
    """The name of its run."""
    text: str


@dataclass(frozen=True)
class Done:
    """A job was done."""

    run: str
    saved: Mapping[str, float] = field(default_factory=dict)
    """Seconds of work that were taken over from other runs, by what it was."""


class Cause(StrEnum):
    """Why a job was not done."""

    REFUSED = "refused"
    """It would fail again the same way."""
    BROKEN = "broken"
    """By an error that nobody foresaw."""
    LOST = "lost"
    """The worker is gone."""


@dataclass(frozen=True)
class NotDone:
    """A job ended without being done."""

    run: str
    cause: Cause
    reason: str | CopruneError

    @property
    def text(self) -> str:
        """What people are told of it."""
        return str(self.reason).strip()


JobEvent = Doing | Done | NotDone
Tell = Callable[[JobEvent], None]
