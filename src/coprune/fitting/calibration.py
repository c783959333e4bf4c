"""The text that a fit calibrates and trains on: of the seen half and more, and nothing of the unseen half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.progress import Reporter
from coprune.fitting.doubles import holding
from coprune.fitting.reader import Reader
from coprune.fitting.tasks import Task, joined, shared_out

_CHARACTERS = 1200
"""Of a document that short texts are joined to."""


_OWN_TEXTS, _OWN_TOKENS = 16, 256
"""Texts of the model's own at most, and tokens of one."""
_LEAST_TOKENS, _CHARACTERS_OF_TOKEN = 320, 5
"""Of the seen items that calibrate at least, and what a token is taken for before it is counted."""
_TIMES = 4
"""Texts that are drawn at most for each wanted one, since some end at once."""


class Passage(BaseModel):
    """A document of calibration text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    judging: bool
    """Whether it holds an item that tells first what a candidate keeps."""


def calibration_of(
    tasks: Sequence[Task], text_of: Callable[[Task, int], str], more: Sequence[str]
) -> tuple[list[Passage], str]:
    """Join the seen items' text and more, without what gives an unseen item away.

    Args:
        tasks: items in two halves.
        text_of: returns an item with its answer.
        more: text that belongs to no task.

    Returns:
        The passages, and a line on what was left out; an empty one if nothing was.

    Raises:
        BadInput: nothing is left.
    """
    own = [[text_of(task, place) for place in reversed(task.seen)] for task in tasks]
    # The first seen items judge first. They come last here, so that a share of a task is of the others.
    judging = {text for some in own for text in some[len(some) - len(some) // 2 :]}
    every = [*more, *(text for some in own for text in some)]
    seen, unseen = ([task.items[place].asked for task in tasks for place in half(task)] for half in (_seen, _unseen))
    left_out = {every[place] for place in holding(every, unseen, seen)}
    clean = [[text for text in some if text not in left_out] for some in own]
    shares = [task.share for task, some in zip(tasks, clean, strict=True) if some]
    documents = joined(shared_out([some for some in clean if some], shares), _CHARACTERS)
    found = [Passage(text="\n".join(one), judging=not judging.isdisjoint(one)) for one in documents]
    found += [Passage(text=text, judging=False) for text in more if text not in left_out]
    if not found:
        cause = "the text to calibrate on holds nothing but text of the unseen items"
        raise BadInput(cause, field="text", fix="name other text")
    count, of = sum(text in left_out for text in every), len(every)
    line = f"{count} of {of} passages to calibrate on hold text of unseen items and are left out"
    return found, line if count else ""


def texts_in(tokens: int) -> int:
    """Return how many texts of its own the dense model has time for. tokens: that it writes in this time."""
    return min(_OWN_TEXTS, tokens // _OWN_TOKENS)


def own_count(characters: int, texts: int) -> int:
    """Return how many texts of its own the dense model writes: as many as there is time for, or as the items lack.

    characters: of the seen items that calibrate. texts: that there is time for.
    """
    lacking = _LEAST_TOKENS - characters // _CHARACTERS_OF_TOKEN
    return max(0, texts, -(-lacking // _OWN_TOKENS))


def own_texts(reader: Reader, count: int, seed: int, reporter: Reporter) -> list[str]:
    """Draw texts from a model, until they have the tokens of a number of whole ones."""
    generator, found, left = torch.Generator().manual_seed(seed), list[str](), count * _OWN_TOKENS
    with reporter.bar("Texts", left) as advance:
        for _ in range(_TIMES * count):
            ids = reader.invent(min(left, _OWN_TOKENS), generator)
            found.append(reader.text(ids))
            left -= len(ids)
            advance(len(ids))
            if left <= 0:
                break
    return [text for text in found if text.strip()]


def all_windows(ids: Sequence[int], longest: int) -> torch.Tensor:
    """Split a text into as few windows of equal length as there have to be: windows × tokens int64, all but a remainder.

    ids: one token at least. longest: tokens of a window at most.
    """
    count = -(-len(ids) // longest)
    length = len(ids) // count
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def _seen(task: Task) -> Sequence[int]:
    return task.seen


def _unseen(task: Task) -> Sequence[int]:
    return task.unseen


def read_passages(file: Path) -> list[Passage]:
    """Read calibration text. Raises ValueError for another file."""
    lines = file.read_text(encoding="utf-8").split("\n")  # a text may hold other ends of lines
    return [Passage.model_validate_json(line) for line in lines if line]


def write_passages(file: Path, passages: Sequence[Passage]) -> None:
    """Write calibration text, a document a row."""
    write_text(file, "".join(f"{passage.model_dump_json()}\n" for passage in passages))
