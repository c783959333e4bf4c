"""A step: makes a model of another one, or of several, in a folder where it is found again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel

from coprune.run.result import Result

Taking = Callable[[], AbstractContextManager[object]]
"""Entered by a step when all its checks have passed, around its first write."""


@dataclass(frozen=True)
class Left:
    """What a step leaves: a record, and a model in a folder or in memory."""

    record: BaseModel
    model: Path | None = None
    held: Result | None = None

    @classmethod
    def of(cls, result: Result) -> Self:
        """Return what a run leaves."""
        return cls(result.report, result.report.saved_model, result)


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """Makes a model of another one, or of several."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the step is done differently."""

    folder: Path | None
    """Where it works and leaves its record; None where nothing is found again."""
    settings: Mapping[str, Any]
    """Values that decide what it makes, without names of models."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Values that decide what else is in its record: an unfinished step may go on with others."""

    def check(self) -> None:  # noqa: B027
        """Raise BadInput for what can be refused before anything is done."""

    @abstractmethod
    def sources(self, before: Left | None) -> Sequence[str]:
        """Return digests of the models and texts that it reads."""

    @abstractmethod
    def finished(self, before: Left | None) -> Left | None:
        """Return what lies whole in its folder, whoever made it."""

    def clear(self) -> None:  # noqa: B027
        """Remove what it has made outside its folder."""

    @abstractmethod
    def run(self, before: Left | None, taking: Taking) -> Left:
        """Make it, resuming from what an interrupted run left in the folder."""
