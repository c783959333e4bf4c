"""The inputs of a fit, and its stored notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, RootModel

from coprune.base.devices import describe
from coprune.base.environment import installed_version
from coprune.base.errors import about
from coprune.evaluation.asked_texts import text_fingerprint
from coprune.fitting.candidates import Candidate
from coprune.fitting.fit_settings import Runtime
from coprune.fitting.foreign_files import candidates_in
from coprune.fitting.tasks import Task
from coprune.fitting.writing import writing_of
from coprune.model.checkpoint.digest import source_digest
from coprune.model.checkpoint.locate import locate
from coprune.recipe.choice import read_named
from coprune.report.schema import installed_versions
from coprune.run.step import NamedStep, step_named
from coprune.store.notes import read_note, write_note

Value = TypeVar("Value")


class Sizes(RootModel[dict[str, int]]):
    """Numbers by name."""


class Looks(RootModel[list[tuple[list[str], list[str]]]]):
    """Conditions with the candidates judged by them, in order."""


def noted(file: Path, kind: type[RootModel[Value]], otherwise: Value) -> Value:
    """Return the value of a note, or `otherwise` if it is missing or damaged."""
    found = read_note(file, kind)
    return otherwise if found is None else found.record.root


def count_looks(file: Path, conditions: Sequence[str], judged: Sequence[str]) -> int:
    """Record that the unseen half has judged these candidates by these conditions, and count such records.

    Judging the same candidates by looser conditions is another attempt, and counts as one.

    Args:
        file: of the records.
        conditions: their texts.
        judged: the candidates' keys, in order.
    """
    damaged: tuple[list[str], list[str]] = ([], ["a note that is damaged now"])
    known = noted(file, Looks, [damaged] if file.exists() else [])
    look = (sorted("".join(one.split()) for one in conditions), [*judged])
    if look not in known:
        known.append(look)
        write_note(file, Looks(known))
    return len(known)


@dataclass(frozen=True)
class Asked:
    """The inputs that determine every candidate and measurement."""

    model: str
    tasks: tuple[Task, ...]
    seed: int = 0
    text: str | None = None
    """Additional text to calibrate and distill on; None to let the model write it."""
    like: str | None = None
    """A GGUF file of the source model."""
    runtime: Runtime = "llama.cpp"
    files: tuple[str, ...] = ()
    """Candidate GGUF files given by the user; no other candidate depends on them."""
    step: tuple[str, ...] = ()
    """Steps of the user's, as `name:setting=value`; only candidates that are made by one depend on it."""

    @cached_property
    def foreign(self) -> dict[Candidate, Path]:
        """The given files as candidates, with their paths. Raises BadInput for damaged files."""
        return candidates_in(self.files)

    @cached_property
    def steps(self) -> dict[str, NamedStep]:
        """The steps by their texts."""
        return {text: step_named(*read_named(text), Path()) for text in self.step}

    @cached_property
    def digests_of_steps(self) -> dict[str, list[str]]:
        """Digests of what each step reads besides the model before it, computed once and passed on to workers."""
        return {text: [*step.sources(None)] for text, step in self.steps.items()}

    def check_steps(self) -> None:
        """Raise BadInput for a step that is unknown, has wrong settings, or cannot read its files."""
        with about("step", ", ".join(self.step)):
            for step in self.steps.values():
                step.check()
            _ = self.digests_of_steps

    @cached_property
    def writing(self) -> tuple[Task, ...]:
        """Tasks that test whether a model still writes; only cuts are measured on them."""
        return writing_of(self.tasks)

    @property
    def every_task(self) -> tuple[Task, ...]:
        """The tasks, including those that test whether a model still writes."""
        return (*self.tasks, *self.writing)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the contents of the model, `like` and `text`, computed once and passed on to workers."""

        def of_model(name: str) -> str:
            return source_digest(locate(name))

        given = {"model": (self.model, of_model), "like": (self.like, of_model), "text": (self.text, text_fingerprint)}
        found = {}
        for setting, (name, digest) in given.items():
            if name is not None:
                with about(setting, name):
                    found[setting] = digest(name)
        return found

    def facts(self) -> dict[str, Any]:
        """Return the inputs as JSON, with files identified by their contents and not their paths."""
        tasks = [task.fingerprint for task in self.tasks]
        return {"tasks": tasks, "seed": self.seed, "runtime": self.runtime} | self.digests

    @cached_property
    def contents(self) -> dict[str, Any]:
        """For keys: what determines a candidate and its measurements besides the tasks and the calibration text."""
        packages = {name: installed_version(name) for name in ("llama-cpp-py-sync", "gguf")}
        made = {"digests": self.digests, "seed": self.seed, "runtime": self.runtime}
        return made | {"versions": installed_versions() | packages, "processor": describe(torch.device("cpu"))}


class Measured(BaseModel):
    """Measurements of a candidate."""

    bytes: int = 0
    memory: int = 0
    """Bytes of the weights and of the cache for 2,048 tokens."""
    speed: float = 0.0
    """Tokens per second of decoding on an idle machine, from the processor time of the fastest token."""
    seconds: float = 0.0
    refused: str = ""
    """Why it cannot be made; empty if it can."""
    scores: dict[str, dict[str, dict[int, float]]] = {}
    """Scores of items by the task's key, metric and the item's index."""

    @property
    def unmade(self) -> bool:
        """Whether it was neither made nor refused, for lack of time."""
        return not self.bytes and not self.refused

    def of(self, task: Task, metric: str, places: Sequence[int]) -> list[float]:
        """Return the scores of some items."""
        found = self.scores[task.key][metric]
        return [found[place] for place in places]

    def items(self, task: Task) -> int:
        """Return the number of a task's items with a score."""
        return max(map(len, self.scores.get(task.key, {}).values()), default=0)

    def missing(self, task: Task, places: Sequence[int]) -> list[int]:
        """Return the indices of items without a score."""
        own = self.scores.get(task.key, {})
        there = set.intersection(*(set(one) for one in own.values())) if own else set()
        return [place for place in places if place not in there]
