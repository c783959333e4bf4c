"""Tasks: the data that a model reads, and its metric.

A run gets calibration samples, evaluation data and the measurement from its task; blocks, matrices, methods, the walk and
the checkpoint do not depend on it. All tasks are entries of one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Advance, Reporter
from coprune.data.windows import Samples
from coprune.evaluation.measurement import Measured
from coprune.evaluation.tasks.embedding_task import PASSAGE, PassageVectors
from coprune.evaluation.tasks.image_task import ImageAccuracy, ImageInputs
from coprune.evaluation.tasks.label_task import LabelAccuracy
from coprune.evaluation.tasks.masked_task import PseudoPerplexity
from coprune.evaluation.tasks.pair_task import PairInputs, TargetPerplexity
from coprune.evaluation.tasks.speech_task import SpeechInputs, WordErrors
from coprune.evaluation.tasks.task import Data, Remember, Walked, named, read_anew, texts_of
from coprune.evaluation.tasks.text_task import TextInputs, TextPerplexity
from coprune.model.checkpoint.load import WHAT, TaskName
from coprune.model.loaded_model import Loaded
from coprune.recipe.recipe import Recipe

__all__ = ["TASKS", "Data", "Metric", "Remember", "Task", "Walked", "named", "read_anew", "task_for", "texts_of"]

Batch = TypeVar("Batch", bound=Tensor)
Asked = TypeVar("Asked", bound=Data)


class Inputs(Protocol[Batch]):
    """The data that a model reads."""

    @property
    def text(self) -> TextInputs | None:
        """Windows of text with their length; None for images."""
        ...

    def calibration(self, needed: bool, reporter: Reporter) -> Samples[Batch] | None:
        """Draw the calibration samples; None if they are not needed and cannot be read.

        needed: whether the run depends on them; otherwise they only serve to measure layer errors.
        """
        ...

    def probe(self, samples: Samples[Batch] | None, data: Mapping[str, Data]) -> Tensor:
        """Return one sample with which to prove the replay."""
        ...

    def batches(self, samples: Batch, marks: Tensor | None = None) -> Sequence[Tensor]:
        """Split calibration samples into batches of equal length on the model's device.

        marks: a value per token (samples × S), to be split likewise and returned instead.
        """
        ...


class Metric(Protocol[Asked]):
    """A measurement of a model, and its data."""

    name: str
    figures: tuple[str, ...]
    """Names of its figures in requirements."""

    def evaluation(self, reporter: Reporter) -> dict[str, Asked]:
        """Open all evaluation data, by name; empty if none is requested or known."""
        ...

    def measure(self, data: Asked, advance: Advance, walked: Walked | None = None) -> Measured:
        """Measure the model in its present state, together with the other processes of a run.

        walked: the model of a run; None for one that is completely in memory.
        """
        ...


@dataclass(frozen=True)
class Task:
    """The data that a model reads, and its metric."""

    inputs: Inputs[Any]
    metric: Metric[Any]


_Whole = partial(TextInputs, whole=True)
TASKS: dict[TaskName, tuple[Callable[..., Inputs[Any]], Callable[[Any], Metric[Any]]]] = {
    "text": (TextInputs, TextPerplexity),
    "masked": (_Whole, PseudoPerplexity),
    "labels": (_Whole, LabelAccuracy),
    "embeddings": (partial(_Whole, usual=PASSAGE), PassageVectors),
    "images": (ImageInputs, ImageAccuracy),
    "pairs": (PairInputs, TargetPerplexity),
    "speech": (SpeechInputs, WordErrors),
}


def task_for(recipe: Recipe, loaded: Loaded, processes: Processes = ALONE, remember: Remember = read_anew) -> Task:
    """Return the task of a loaded model.

    Args:
        recipe: the recipe.
        loaded: the model.
        processes: the processes that measure together.
        remember: returns tokenised texts, from the store if they were tokenised before.

    Raises:
        BadInput: a setting does not apply to such models.
    """
    make_inputs, make_metric = TASKS[loaded.task]
    inputs = make_inputs(recipe, loaded, processes, remember)
    task = Task(inputs, make_metric(inputs))
    for required in recipe.evaluate.answers.measured:
        if required.name not in task.metric.figures:
            cause = f"{loaded.source} {WHAT[loaded.task]}, and {required.name} is not measured of it"
            fix = f"require {' or '.join(task.metric.figures)}"
            raise BadInput(cause, field="require", value=recipe.evaluate.answers.require, fix=fix)
    return task
