"""The text that a fit calibrates and trains on: the seen half and other text, without anything from the unseen half."""

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
"""Length of the documents that short texts are joined into."""


_OWN_TEXTS, _OWN_TOKENS = 16, 256
"""Maximum number of texts that the model writes, and tokens of each."""
_LEAST_TOKENS, _CHARACTERS_OF_TOKEN = 320, 5
"""Minimum number of calibration tokens, and estimated characters per token."""
_TIMES = 4
"""Maximum number of texts generated per wanted one, since some end immediately."""


class Passage(BaseModel):
    """A document of calibration text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    judging: bool
    """Whether it contains one of the items that candidates are judged on first."""


def calibration_of(
    tasks: Sequence[Task], text_of: Callable[[Task, int], str], more: Sequence[str], whole: Sequence[Task]
) -> tuple[list[Passage], str]:
    """Join the text of the seen items and other text, without passages that contain an unseen item.

    Args:
        tasks: items in two halves.
        text_of: returns an item with its answer.
        more: other text.
        whole: the same tasks with the items that the budget leaves out: a larger one may take them later.

    Returns:
        The passages, and a message about omitted ones, empty if there are none.

    Raises:
        BadInput: no passage is left.
    """
    own = [[text_of(task, place) for place in reversed(task.seen)] for task in tasks]
    # Candidates are judged on the first seen items first. These come last here, so that a task's share uses the others.
    judging = {text for some in own for text in some[len(some) - len(some) // 2 :]}
    every = [*more, *(text for some in own for text in some)]
    seen, unseen = ([task.items[place].asked for task in whole for place in half(task)] for half in (_seen, _unseen))
    left_out = {every[place] for place in holding(every, unseen, seen)}
    clean = [[text for text in some if text not in left_out] for some in own]
    shares = [task.share for task, some in zip(tasks, clean, strict=True) if some]
    documents = joined(shared_out([some for some in clean if some], shares), _CHARACTERS)
    found = [Passage(text="\n".join(one), judging=not judging.isdisjoint(one)) for one in documents]
    found += [Passage(text=text, judging=False) for text in more if text not in left_out]
    if not found:
        cause = "the calibration text contains nothing but text of the unseen items"
        raise BadInput(cause, field="text", fix="use other text")
    count, of = sum(text in left_out for text in every), len(every)
    line = f"Left out {count} of {of} calibration passages that contain text of unseen items"
    return found, line if count else ""


def texts_in(tokens: int) -> int:
    """Return how many texts the dense model has time to write. tokens: that it can write in that time."""
    return min(_OWN_TEXTS, tokens // _OWN_TOKENS)


def own_count(characters: int, texts: int) -> int:
    """Return how many texts the dense model writes: as many as time allows, but at least what the items lack.

    characters: in the seen items used for calibration. texts: that time allows.
    """
    lacking = _LEAST_TOKENS - characters // _CHARACTERS_OF_TOKEN
    return max(0, texts, -(-lacking // _OWN_TOKENS))


def own_texts(reader: Reader, count: int, seed: int, reporter: Reporter) -> list[str]:
    """Sample texts from a model until they have as many tokens as `count` full-length texts."""
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
    """Split a text into the fewest windows of equal length, dropping a remainder: windows × tokens int64.

    ids: at least one token. longest: maximum tokens per window.
    """
    count = -(-len(ids) // longest)
    length = len(ids) // count
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def _seen(task: Task) -> Sequence[int]:
    return task.seen


def _unseen(task: Task) -> Sequence[int]:
    return task.unseen


def read_passages(file: Path) -> list[Passage]:
    """Read calibration text. Raises ValueError if the file is not one."""
    lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may contain other line ends
    return [Passage.model_validate_json(line) for line in lines if line]


def write_passages(file: Path, passages: Sequence[Passage]) -> None:
    """Write calibration text, one document per row."""
    write_text(file, "".join(f"{passage.model_dump_json()}\n" for passage in passages))
