"""Tasks: what a model reads, and how it is measured.

A run asks its task for samples to calibrate on, for data to measure on, and for the measurement; blocks, matrices,
methods, the walk and the checkpoint know nothing of it. The tasks are the entries of one table.
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
    """What a model reads."""

    @property
    def text(self) -> TextInputs | None:
        """Windows of text and their length; None for images."""
        ...

    def calibration(self, needed: bool, reporter: Reporter) -> Samples[Batch] | None:
        """Draw the calibration samples; None if nothing needs them.

        needed: whether all of them are, or just a few to measure layer errors on.
        """
        ...

    def probe(self, samples: Samples[Batch] | None, data: Mapping[str, Data]) -> Tensor:
        """Return one sample for proving the replay."""
        ...

    def batches(self, samples: Batch, marks: Tensor | None = None) -> Sequence[Tensor]:
        """Cut calibration samples into batches of one length on the model's device.

        marks: something of every token, samples × S, which is cut likewise and given instead.
        """
        ...


class Metric(Protocol[Asked]):
    """What is measured of a model, and on which data."""

    name: str
    figures: tuple[str, ...]
    """What is measured, as requirements call it."""

    def evaluation(self, reporter: Reporter) -> dict[str, Asked]:
        """Open everything that is measured on, by name; empty if nothing is asked for or known."""
        ...

    def measure(self, data: Asked, advance: Advance, walked: Walked | None = None) -> Measured:
        """Measure the model as it is now, together with the other processes of a run.

        walked: the model of a run; None for one that is whole in memory.
        """
        ...


@dataclass(frozen=True)
class Task:
    """What a model reads, and how it is measured."""

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
        recipe: what is asked for.
        loaded: the model.
        processes: those that measure together.
        remember: where tokenised texts come from, if they were tokenised before.

    Raises:
        BadInput: for settings that make no sense for the model.
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
