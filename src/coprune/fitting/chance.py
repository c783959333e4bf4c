"""Refuse tasks at which the dense model is no better than chance."""

from __future__ import annotations

from coprune.base.errors import BadInput
from coprune.evaluation.bounds import Share
from coprune.fitting.budget import EXACT_DENSE
from coprune.fitting.candidates import DENSE
from coprune.fitting.fit_notes import Measured
from coprune.fitting.score import answer_text
from coprune.fitting.tasks import METRICS_OF, Task
from coprune.fitting.workshop import Workshop


def refuse_chance(workshop: Workshop, task: Task, dense: Measured) -> None:
    """Raise BadInput if the dense model, as measured, is not better than chance at a task."""
    if "accuracy" not in METRICS_OF[task.kind]:
        return
    places = task.apart([*task.seen, *task.unseen])
    right = dense.of(task, "accuracy", places)
    share = sum(right) / len(right)
    if task.kind == "answer" and not any(right):
        item, making = task.items[places[0]], workshop.making
        reader = making.reader(making.file(EXACT_DENSE), DENSE)
        cause = f"none of the dense model's {len(right)} answers to {task.name} matches"
        said = f"{answer_text(reader, item).strip()[:60]!r} was written where {item.regex or item.answer!r} is right"
        raise BadInput(cause, field="task", value=task.name, fix=f"{said}; give examples in the prompt, or a regex")
    if task.kind == "choice" and not Share(sum(right), 0, 0, len(right)).is_above(task.chance):
        what = f"the dense model's accuracy on {task.name}, {share:.3f} of {len(right)} items,"
        cause = f"{what} is not proven to be above chance ({task.chance:.3f})"
        fix = "there is nothing to keep: take another model, prompts that it understands, or more items"
        raise BadInput(cause, field="task", value=task.name, fix=fix)
