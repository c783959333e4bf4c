"""Sources of a model to measure: files, loaded on demand, or memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from coprune.base.progress import Reporter
from coprune.model.checkpoint.digest import bytes_of_weights, model_digest
from coprune.model.checkpoint.load import TaskName, task_at
from coprune.model.checkpoint.locate import locate
from coprune.model.loaded_model import Loaded, handed_over_model, open_model, say_of_bfloat16
from coprune.recipe.parts import ModelPart

Model = str | Path | PreTrainedModel
"""A model, by name or in memory."""


class Source(Protocol):
    """A model that can be opened."""

    name: str
    fingerprint: str
    """Key of its stored measurements."""
    task: TaskName
    """The model's task."""

    def open(self, reporter: Reporter) -> Loaded:
        """Load the model into memory."""
        ...

    def bytes_of_weights(self) -> int:
        """Return the size of its files, or in memory."""
        ...


class Stored:
    """A model in files, located at once. Raises BadInput if it does not exist."""

    def __init__(self, asked: ModelPart) -> None:
        self._asked = asked
        location = locate(asked.name, asked.cache_dir)
        self._path = location.path
        self.name = location.name
        self.fingerprint = model_digest(location.path)
        self.task: TaskName = task_at(location)

    def open(self, reporter: Reporter) -> Loaded:
        reporter.say(f"Loading {self.name}")
        loaded = open_model(self._asked, stream=False)
        say_of_bfloat16(reporter, loaded)
        return loaded

    def bytes_of_weights(self) -> int:
        return bytes_of_weights(self._path)


class Held:
    """A model in memory, whose measurements are not stored, since it may change."""

    fingerprint = "in memory"

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self._loaded = handed_over_model(model, processor)
        self.name = self._loaded.source
        self.task: TaskName = self._loaded.task

    def open(self, reporter: Reporter) -> Loaded:
        say_of_bfloat16(reporter, self._loaded, by_name=False)
        return self._loaded

    def bytes_of_weights(self) -> int:
        return sum(one.numel() * one.dtype.itemsize for one in self._loaded.model.parameters())
