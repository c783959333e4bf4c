"""Test whether a model without some of its parts or tokens still writes, which other tasks may not show.

Models that loop, never stop or drift off topic can still pass items that are scored by the likelihood of choices, by one
word or by reading (arXiv 2606.17609).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coprune.evaluation.answers.answer_records import find_loop
from coprune.fitting.require import Condition
from coprune.fitting.tasks import Item, Task

_ITEMS = 32
"""Maximum number of items of each half whose prompts are continued."""
REQUIRED = (
    Condition("still writes: acceptance>=0.5", "acceptance", True, 0.0, 0.5),
    Condition("still writes: sound>=dense-0.25", "sound", True, 1.0, -0.25),
)
"""Conditions on a cut for such a task, in both halves."""


def writing_of(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Return a task of prompts to continue for every task without longer answers."""
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
    """Return whether both halves of such a task have enough items."""
    least = max(condition.least_items() or 0 for condition in REQUIRED)
    return min(len(task.seen), len(task.unseen)) >= least


def _prompt(item: Item) -> Item:
    """Return an item to continue: a prompt, or the first half of a text, up to the end of a word."""
    if not item.text:
        return replace(item, choices=(), answer="", regex="")
    start = item.text[: max(1, len(item.text) // 2)]
    return Item(prompt=start.rsplit(None, 1)[0] if len(start.split()) > 1 else start)


def is_sound(ids: Sequence[int], ended: bool, other_ended: bool) -> bool:
    """Return whether an answer does not loop and, if the dense model's answer ended, ends as well.

    Args:
        ids: the answer's tokens, without the end token.
        ended: whether it ended.
        other_ended: whether the dense model's answer ended within the maximum number of tokens.
    """
    return find_loop(ids, ended) is None and (ended or not other_ended)
