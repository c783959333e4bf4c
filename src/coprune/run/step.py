"""A step: makes a model of another one, or of several, in a folder where it is found again.

Sweeps name steps by the table here, into which `register_step` puts them, or an installed package by the entry-point
group `coprune.steps`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel

from coprune.base.errors import unknown_name
from coprune.base.validation import settings_of
from coprune.model.checkpoint.locate import locate
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


@dataclass(frozen=True, kw_only=True)
class NamedStep(Step):
    """A step that sweeps can name: it makes a model of the one before it, with settings of its own."""

    asked: ClassVar[type[BaseModel]]
    """Its settings."""

    folder: Path

    @classmethod
    @abstractmethod
    def of(cls, asked: Any, folder: Path) -> Self:
        """Return the step with some of its settings."""

    @property
    def model(self) -> Path:
        """Where it leaves its model."""
        return self.folder / "model"


AnyStep = TypeVar("AnyStep", bound=type[NamedStep])
_GROUP = "coprune.steps"
_registered: dict[str, type[NamedStep]] = {}


def register_step(step: AnyStep) -> AnyStep:
    """Let sweeps name a step in this process; a class decorator."""
    _registered[step.name] = step
    return step


def step_named(name: str, asked: Mapping[str, Any], folder: Path) -> NamedStep:
    """Return a step in a folder. Raises BadInput for an unknown name, or settings that are not its own."""
    brought = {entry.name: entry for entry in entry_points(group=_GROUP)}
    if name not in _registered and name in brought:
        register_step(brought[name].load())
    if name not in _registered:
        raise unknown_name("step", name, {*_registered, *brought})
    step = _registered[name]
    return step.of(settings_of(step.asked, asked), folder)


class Named(BaseModel):
    """A model that no step made."""

    name: str


def source_named(name: str, cache_dir: Path | None = None) -> Left:
    """Return a model as what a first step is made of. Raises BadInput where there is none."""
    return Left(Named(name=name), locate(name, cache_dir).path)
