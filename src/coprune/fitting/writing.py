"""Whether a model without some of its parts or tokens still writes, where the tasks alone would not tell.

Items that are answered by the likelihood of choices, by a word or by reading are passed by models that loop, never stop or write
of something else (arXiv 2606.17609).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coprune.evaluation.answers.answer_records import find_loop
from coprune.fitting.require import Condition
from coprune.fitting.tasks import Item, Task

_ITEMS = 32
"""Items of each half, or fewer, whose prompts are continued."""
REQUIRED = (
    Condition("still writes: acceptance>=0.5", "acceptance", True, 0.0, 0.5),
    Condition("still writes: sound>=dense-0.25", "sound", True, 1.0, -0.25),
)
"""What a cut has to keep on such a task, in either half."""


def writing_of(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Return, for every task without answers of some length, one of its first items' prompts to be continued."""
    return tuple(
        Task(
            f"{task.name}, continued",
            "writing",
            tuple(_prompt(item) for item in task.items),
            tuple(task.apart(task.seen)[:_ITEMS]),
            tuple(task.apart(task.unseen)[:_ITEMS]),
        )
        for task in tasks
        if task.kind != "prompts"
    )


def provable(task: Task) -> bool:
    """Return whether a task that is continued has enough items in both halves."""
    least = max(condition.least_items() or 0 for condition in REQUIRED)
    return min(len(task.seen), len(task.unseen)) >= least


def _prompt(item: Item) -> Item:
    """Return what is continued: a prompt, or the first half of a text, up to a word's end."""
    if not item.text:
        return replace(item, choices=(), answer="", regex="")
    start = item.text[: max(1, len(item.text) // 2)]
    return Item(prompt=start.rsplit(None, 1)[0] if len(start.split()) > 1 else start)


def is_sound(ids: Sequence[int], ended: bool, other_ended: bool) -> bool:
    """Return whether an answer neither loops nor goes on where the dense model's ended.

    Args:
        ids: the answer's tokens, without the end.
        ended: whether it ended.
        other_ended: whether the dense model's did, within as many tokens as it may take.
    """
    return find_loop(ids, ended) is None and (ended or not other_ended)
