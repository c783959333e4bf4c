"""Tasks as items (choices, answers, text or prompts), split into a half that the search sees and an unseen one."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.patterns import require_pattern
from coprune.data.local_text import holds_rows, local_text, looks_local, rows_of
from coprune.fitting.doubles import clusters_of

Kind = Literal["choice", "answer", "text", "prompts", "writing"]
"""Kinds of tasks; `writing` is internal (`coprune.fitting.writing`)."""
Prompt = str | tuple[tuple[str, str], ...]
"""Text, or the messages of a conversation: pairs of role and content."""
METRICS_OF: dict[Kind, tuple[str, ...]] = {
    "choice": ("accuracy",),
    "answer": ("accuracy",),
    "text": ("bits",),
    "prompts": ("acceptance", "kl"),
    "writing": ("acceptance", "sound"),
}
LEAST_HALF = 8
"""Minimum number of items in a half."""
_DEFINITIONS = (".yaml", ".yml")
"""Suffixes of lm-eval's task definitions."""
_SHARED = re.compile(r"(.+):(\d*\.?\d+)")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LONGEST = 500_000
"""Maximum characters of an item, more than models read; tokenising ten million takes gigabytes."""
_PASSAGE = 300
"""Approximate characters of an item of plain text, which consists of whole lines."""
_EXAMPLES = (
    '{"prompt": …, "choices": […], "answer": …}, {"prompt": …, "answer": …} or {"prompt": …, "regex": …}, {"prompt": …}, '
    '{"messages": […]}, {"text": …}'
)


@dataclass(frozen=True)
class Item:
    """An item of a task. An item with only `text` is read; one with only a prompt is continued."""

    prompt: Prompt = ""
    choices: tuple[str, ...] = ()
    answer: str = ""
    """The right choice, or the expected first line of the answer."""
    regex: str = ""
    """Pattern to find in the answer."""
    text: str = ""

    @property
    def kind(self) -> Kind:
        """Kind of task."""
        if self.text:
            return "text"
        if self.choices:
            return "choice"
        return "answer" if self.answer or self.regex else "prompts"

    @property
    def asked(self) -> str:
        """The text that a model reads, without the right answer."""
        said = self.prompt if isinstance(self.prompt, str) else "\n".join(content for _, content in self.prompt)
        return self.text or said


@dataclass(frozen=True)
class Task:
    """Items of one kind."""

    name: str
    kind: Kind
    items: tuple[Item, ...]
    seen: tuple[int, ...]
    """Indices of the items that the search sees."""
    unseen: tuple[int, ...]
    share: float = 1.0
    """Share of the calibration text, relative to other tasks."""
    clusters: tuple[int, ...] = ()
    """Cluster number of every item, equal for near-duplicates; empty if there are none."""

    def apart(self, places: Sequence[int]) -> list[int]:
        """Return the first index of each cluster, since near-duplicates count as one item in a proof."""
        if not self.clusters:
            return [*places]
        return [*{self.clusters[place]: place for place in reversed(places)}.values()][::-1]

    @cached_property
    def key(self) -> str:
        """Digest of the items, which identifies their scores."""
        return _digest([self.kind, repr(self.items)])

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the items and their halves."""
        return _digest([self.key, self.seen, self.unseen, self.share, self.clusters])

    @property
    def chance(self) -> float:
        """Accuracy of guessing, or of the most frequent answer if all items have the same choices."""
        if self.kind != "choice":
            return 0.0
        if _same_choices(self.items):
            return max(Counter(item.answer for item in self.items).values()) / len(self.items)
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "replace")).hexdigest()[:32]


def read_tasks(names: Sequence[str], seed: int = 0, most: int | None = None, trusted: bool = False) -> tuple[Task, ...]:
    """Read the items of tasks and split them so that near-duplicates are in the same half, across all tasks.

    Args:
        names: .jsonl or .csv files, plain text, multiple-choice tasks of lm-eval, or definitions of such tasks (.yaml);
            optionally with a share after a colon (`mine.jsonl:0.7`).
        seed: of the halves.
        most: maximum number of items per task, sampled by the seed.
        trusted: whether a definition may run code.

    Returns:
        The tasks, without duplicates, in two halves.

    Raises:
        BadInput: a file cannot be read, its items are of no kind or of several, there are too few, or one choice is always
            right.
    """
    found = [(*_share(name),) for name in names]
    if len({name for name, _ in found}) < len(found):
        name = next(name for name, times in Counter(name for name, _ in found).items() if times > 1)
        raise _wrong(name, "is named twice", "name it once")
    read = [(name, share, _different(name, trusted)) for name, share in found]
    orders = [_drawn(len(items), seed, most) for _, _, items in read]
    compared = [
        "\n".join([items[place].asked, *sorted(items[place].choices)])
        for (_, _, items), order in zip(read, orders, strict=True)
        for place in order
    ]
    numbers, half, tasks = iter(clusters_of(compared)), dict[int, bool](), list[Task]()
    for (name, share, items), order in zip(read, orders, strict=True):
        cluster = {place: next(numbers) for place in order}
        different = dict.fromkeys(cluster.values())
        _split(different, half)
        seen = [place for place in order if half[cluster[place]]]
        unseen = [place for place in order if not half[cluster[place]]]
        if min(len({cluster[place] for place in one}) for one in (seen, unseen)) < LEAST_HALF:
            what = f"has {len(different)} different items"
            if len(different) >= 2 * LEAST_HALF:
                what += ", but too many are near-duplicates of another task's items in one half"
            raise _wrong(name, what, f"give it at least {2 * LEAST_HALF}")
        clusters = tuple(cluster.get(place, -1) for place in range(len(items)))
        alone = len(different) == len(order)
        tasks.append(Task(name, items[0].kind, items, (*seen,), (*unseen,), share, () if alone else clusters))
    return tuple(tasks)


def _different(name: str, trusted: bool) -> tuple[Item, ...]:
    """Read the distinct items of a task. Raises BadInput if they are of several kinds."""
    path = expand_home(name)
    if not is_file(name):
        found = _of_harness(name, trusted)
    elif holds_rows(path) and path.exists():
        found = _items(rows_of(path), name)
    else:
        found = _passages(local_text(name).text)
    items = tuple(dict.fromkeys(found))
    kinds = sorted({item.kind for item in items})
    if not items:
        raise _wrong(name, "has no items", f"write rows like {_EXAMPLES}")
    if len(kinds) > 1:
        raise _wrong(name, f"has items of several kinds ({', '.join(kinds)})", "put each kind in its own file")
    _refuse_one_class(name, items)
    return items


def _drawn(count: int, seed: int, most: int | None) -> list[int]:
    """Return item indices in a seeded random order."""
    order = list(range(count))
    random.Random(f"{seed} {count}").shuffle(order)
    return order[:most]


def _split(different: Iterable[int], half: dict[int, bool]) -> None:
    """Assign clusters of a task to halves of equal size, keeping the assignments of earlier tasks."""
    there = [*different]
    wanted = len(there) // 2 - sum(half[one] for one in there if one in half)
    for one in there:
        if one not in half:
            half[one] = wanted > 0
            wanted -= 1


def is_file(name: str) -> bool:
    """Return whether a task is a file of items or text, not a task of lm-eval."""
    name = _share(name)[0]
    return expand_home(name).suffix not in _DEFINITIONS and looks_local(name)


def _share(name: str) -> tuple[str, float]:
    found = None if expand_home(name).exists() else _SHARED.fullmatch(name)
    if found is None:
        return name, 1.0
    if not float(found[2]) > 0:
        raise _wrong(name, "has a share of 0", "use a number above 0, or leave the task out")
    return found[1], float(found[2])


def _of_harness(name: str, trusted: bool) -> list[Item]:
    """Read the items of an lm-eval task, by name or definition. Raises BadInput."""
    from coprune.evaluation.harness_tasks import find_tasks, foreign_in, isolated
    from coprune.evaluation.zero_shot import ZeroShotSettings

    path = expand_home(name)
    if (defined := path.suffix in _DEFINITIONS) and not path.is_file():
        raise _wrong(name, "does not exist", "check the path")
    settings = ZeroShotSettings(
        (str(path) if defined else name,), include_path=path.parent if defined else None, trusted=trusted
    )
    try:
        known = find_tasks(settings)
    except BadInput as error:
        error.field, error.value = "task", name
        raise
    with isolated(), foreign_in(settings).sandboxed():
        return [_of_document(task, document, name) for task in known["tasks"].values() for document in task.eval_docs]


def _of_document(task: Any, document: Any, name: str) -> Item:
    choices = task.doc_to_choice(document) if task.OUTPUT_TYPE == "multiple_choice" else None
    prompt = None if choices is None else task.doc_to_text(document)
    if not isinstance(prompt, str) or not isinstance(choices, list):
        fix = "write its items as {prompt, regex} or {prompt, choices, answer}"
        raise _wrong(name, "is not a multiple-choice task of lm-eval with one prompt", fix)
    right = task.doc_to_target(document)
    place = choices.index(right) if right in choices else int(right)
    return Item(prompt, tuple(choices), choices[place])


def _refuse_one_class(name: str, items: Sequence[Item]) -> None:
    right = {item.answer or None for item in items}  # items with a pattern have no answer
    if len(right) == 1 and right != {None} and _same_choices(items):
        raise _wrong(name, f"has one right answer, {right.pop()!r}, to every item", "add items with other answers")


def _same_choices(items: Sequence[Item]) -> bool:
    return len({frozenset(item.choices) for item in items}) == 1


def _wrong(name: str, what: str, fix: str) -> BadInput:
    return BadInput(f"{name} {what}", field="task", value=name, fix=fix)


def _passages(text: str) -> list[Item]:
    found, lines = list[Item](), list[str]()
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= _PASSAGE:
            found, lines = [*found, Item(text="".join(lines))], []
    rest = "".join(lines)
    return [*found, Item(text=rest)] if len(rest) >= _PASSAGE // 2 else found


def _items(rows: Any, name: str) -> list[Item]:
    found: list[Item] = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise _wrong(name, f"has no object in row {number}", f"write rows like {_EXAMPLES}")
        found += _item(row, f"{name}, row {number},")
    return found


def _item(row: Mapping[str, Any], place: str) -> list[Item]:
    length = sum(len(one) for one in _texts_in(row))
    if length > _LONGEST:
        raise _wrong(place, f"has {length:,} characters, and an item has at most {_LONGEST:,}", "split it into several")
    if isinstance(row.get("text"), str):
        text = row["text"].strip()
        return [Item(text=text)] if text else []
    prompt = _prompt(row, place)
    choices, answer, regex = row.get("choices"), row.get("answer"), row.get("regex")
    if choices is not None:
        if (
            not isinstance(choices, list)
            or len(choices) < 2
            or not all(isinstance(one, str) and one for one in choices)
        ):
            raise _wrong(place, "has choices that are not a list of at least two texts", f"write rows like {_EXAMPLES}")
        return [Item(prompt, tuple(choices), _right(answer, choices, place))]
    if regex is not None:
        try:
            require_pattern(regex)
        except ValueError as error:
            raise _wrong(place, f"has an unusable regular expression ({error})", "correct it") from None
        return [Item(prompt, regex=regex)]
    if answer is not None:
        if not isinstance(answer, str | int | float) or not str(answer).strip():
            raise _wrong(place, "has an empty answer", "add the answer expected from the model")
        return [Item(prompt, answer=str(answer).strip())]
    return [Item(prompt)]


def _texts_in(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of a row at any depth."""
    left: list[Any] = [row]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            left += value.values() if isinstance(value, Mapping) else value


def _right(answer: Any, choices: Sequence[str], place: str) -> str:
    """Return the right choice. answer: its text, its index from 0, or its letter."""
    if answer in choices:
        return str(answer)
    said = str(answer).strip()
    number = int(said) if said.isdecimal() else _LETTERS.find(said.upper()) if len(said) == 1 else -1
    if 0 <= number < len(choices):
        return choices[number]
    fix = "use one of them, its index from 0, or its letter"
    raise _wrong(place, f"has the answer {answer!r}, which is not among its choices", fix)


def _prompt(row: Mapping[str, Any], place: str) -> Prompt:
    said = row.get("messages", row.get("prompt"))
    if isinstance(said, str) and said.strip():
        return said
    if (
        isinstance(said, list)
        and said
        and all(isinstance(one, Mapping) and {"role", "content"} <= one.keys() for one in said)
    ):
        messages = tuple((str(one["role"]), str(one["content"])) for one in said)
        return messages[:-1] if messages[-1][0] == "assistant" and len(messages) > 1 else messages
    found = ", ".join(map(repr, row)) or "none"
    raise _wrong(place, f"has no prompt; its columns are {found}", f"name them as in {_EXAMPLES}")


def shared_out(texts: Sequence[Sequence[str]], shares: Sequence[float]) -> list[str]:
    """Select texts of tasks in proportion to their shares, as many as possible; with equal shares all texts."""
    if len(set(shares)) < 2:
        return [text for own in texts for text in own]
    unit = min(sum(map(len, own)) / share for own, share in zip(texts, shares, strict=True))
    found = list[str]()
    for own, share in zip(texts, shares, strict=True):
        length = 0
        for text in own:
            if length + len(text) > unit * share + 0.5:
                break
            found.append(text)
            length += len(text)
    return found


def joined(texts: Sequence[str], characters: int) -> list[list[str]]:
    """Group short texts into documents of at least `characters` characters."""
    found, length = list[list[str]](), 0
    for text in texts:
        if not found or length > characters:
            found, length = [*found, []], 0
        found[-1].append(text)
        length += len(text)
    return found
