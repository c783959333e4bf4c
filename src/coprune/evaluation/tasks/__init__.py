"""The differences between models of text and classifiers of images: their inputs, and how they are measured.

A run asks its task for samples to calibrate on, for data to measure on, and for the measurement; blocks, matrices,
methods, the walk and the checkpoint know nothing of it. The tasks are the entries of one table.
"""

from __future__ import annotations

from coprune.base.errors import BadInput
from coprune.base.processes import ALONE, Processes
from coprune.evaluation.tasks.image_task import ImageTask
from coprune.evaluation.tasks.pair_task import PairTask
from coprune.evaluation.tasks.speech_task import SpeechTask
from coprune.evaluation.tasks.task import Data, Remember, Samples, Task, named, read_anew
from coprune.evaluation.tasks.text_task import TextTask
from coprune.evaluation.tasks.whole_texts import EmbeddingTask, LabelTask, MaskedTask, WholeTextTask
from coprune.model.checkpoint.load import WHAT, TaskName
from coprune.model.loaded_model import Loaded
from coprune.recipe.recipe import Recipe

__all__ = [
    "TASKS",
    "Data",
    "EmbeddingTask",
    "ImageTask",
    "LabelTask",
    "MaskedTask",
    "PairTask",
    "Remember",
    "Samples",
    "Task",
    "TextTask",
    "WholeTextTask",
    "named",
    "read_anew",
    "task_for",
]

TASKS: dict[TaskName, type[TextTask] | type[ImageTask]] = {
    "text": TextTask,
    "masked": MaskedTask,
    "labels": LabelTask,
    "embeddings": EmbeddingTask,
    "images": ImageTask,
    "pairs": PairTask,
    "speech": SpeechTask,
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
    task = TASKS[loaded.task]
    for required in recipe.evaluate.answers.measured:
        if required.name not in task.figures:
            cause = f"{loaded.source} {WHAT[loaded.task]}, and {required.name} is not measured of it"
            fix = f"require {' or '.join(task.figures)}"
            raise BadInput(cause, field="require", value=recipe.evaluate.answers.require, fix=fix)
    return task(recipe, loaded, processes, remember)
