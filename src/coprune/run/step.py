"""Steps, which make a model from another one (or several) in a folder, where a later run finds it.

Sweeps and fits find steps by name: those added by `register_step`, and those of installed packages in the entry-point
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
"""Returns a context manager that a step enters around its first write, after all its checks."""


@dataclass(frozen=True)
class Left:
    """The result of a step: a record, and a model in a folder or in memory."""

    record: BaseModel
    model: Path | None = None
    held: Result | None = None

    @classmethod
    def of(cls, result: Result) -> Self:
        """Return the result of a run."""
        return cls(result.report, result.report.saved_model, result)


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """A step that makes a model from another one, or from several."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Increased whenever the step's results change, so that earlier ones are not reused."""

    folder: Path | None
    """Folder of its work and its record; None if later runs cannot reuse it."""
    settings: Mapping[str, Any]
    """Values that decide the resulting model, without model names."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Values that only affect the rest of its record; an unfinished step may resume with different ones."""

    def check(self) -> None:  # noqa: B027
        """Raise BadInput for everything that can be refused before any step starts."""

    @abstractmethod
    def sources(self, before: Left | None) -> Sequence[str]:
        """Return the digests of the models and texts that it reads; of those besides the preceding model if `before` is None."""

    @abstractmethod
    def finished(self, before: Left | None) -> Left | None:
        """Return the finished result in its folder, whichever run made it, or None."""

    def clear(self) -> None:  # noqa: B027
        """Remove its files outside its folder."""

    @abstractmethod
    def run(self, before: Left | None, taking: Taking) -> Left:
        """Execute the step, resuming an interrupted run in its folder."""


@dataclass(frozen=True, kw_only=True)
class NamedStep(Step):
    """A step that sweeps and fits can name; it makes a model from the preceding one, with its own settings."""

    asked: ClassVar[type[BaseModel]]
    """Model of its settings."""

    folder: Path

    @classmethod
    @abstractmethod
    def of(cls, asked: Any, folder: Path) -> Self:
        """Return the step with the given settings, an instance of `asked`."""

    @property
    def model(self) -> Path:
        """Folder of its model."""
        return self.folder / "model"


AnyStep = TypeVar("AnyStep", bound=type[NamedStep])
_GROUP = "coprune.steps"
_registered: dict[str, type[NamedStep]] = {}


def register_step(step: AnyStep) -> AnyStep:
    """Make a step available to sweeps and fits in this process; a class decorator."""
    _registered[step.name] = step
    return step


def step_named(name: str, asked: Mapping[str, Any], folder: Path) -> NamedStep:
    """Return the named step for a folder. Raises BadInput for an unknown name or invalid settings."""
    brought = {entry.name: entry for entry in entry_points(group=_GROUP)}
    if name not in _registered and name in brought:
        register_step(brought[name].load())
    if name not in _registered:
        raise unknown_name("step", name, {*_registered, *brought})
    step = _registered[name]
    return step.of(settings_of(step.asked, asked), folder)


class Named(BaseModel):
    """Record of a source model, which no step made."""

    name: str


def source_named(name: str, cache_dir: Path | None = None) -> Left:
    """Return a model as the source of a first step. Raises BadInput if it does not exist."""
    return Left(Named(name=name), locate(name, cache_dir).path)
