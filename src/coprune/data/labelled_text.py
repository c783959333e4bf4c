"""Texts with labels, one JSON object per line: `text` (optionally `text_pair`) and `label`, or `tokens` and `labels`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import read_given

HINT = 'lines should look like {"text": "…", "label": "positive"}, or {"tokens": ["…"], "labels": ["…"]} for a label per token'


@dataclass(frozen=True)
class LabelledText:
    """A text, a pair of texts, or the words of one, with labels."""

    text: str | tuple[str, str] | list[str]
    labels: tuple[int, ...]
    """Labels of the whole, or of every word."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of a file with labels in the model's numbering."""

    rows: Sequence[LabelledText]
    source: str

    def __len__(self) -> int:
        return len(self.rows)


def labelled_texts(name: str, numbers: Mapping[str, int], classes: int, each_word: bool) -> LabelledTexts:
    """Read a file.

    Args:
        name: its path.
        numbers: the model's label numbers, by name.
        classes: number of the model's classes; 1 is a score with labels 0 and 1.
        each_word: whether every word has a label.

    Raises:
        BadInput: the file does not exist, or a line is incomplete.
    """
    path = expand_home(name)
    if not path.is_file():
        raise BadInput(f"there is no file {name} of labelled texts", fix=HINT)
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {name}"
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise BadInput(f"{where} is not a JSON object", fix=HINT)
        rows.append(_row(entry, where, numbers, max(2, classes), each_word))
    if not rows:
        raise BadInput(f"{name} holds no labelled text", fix=HINT)
    return LabelledTexts(rows, str(path))


def _lines(path: Path) -> list[str]:
    try:
        return read_given(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as text ({error})", fix=HINT) from error


def _row(entry: dict[str, Any], where: str, numbers: Mapping[str, int], classes: int, each_word: bool) -> LabelledText:
    text, label = ("tokens", "labels") if each_word else ("text", "label")
    for key in (text, label):
        if entry.get(key) is None:
            raise BadInput(f"{where} has no {key!r}", fix=HINT)
    said, labels = entry[text], entry[label] if each_word else [entry[label]]
    if each_word:
        right = _are_texts(said) and isinstance(labels, list) and len(labels) == len(said) > 0
        if not right:
            raise BadInput(f"{where} needs as many labels as tokens", fix=HINT)
    else:
        pair = entry.get("text_pair")
        said = said if pair is None else (said, pair)
        if not _are_texts([said] if pair is None else said):
            raise BadInput(f"{where}: its text is not a string", fix=HINT)
    return LabelledText(said, tuple(_number(one, where, numbers, classes) for one in labels))


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(one, str) for one in values)


def _number(label: Any, where: str, numbers: Mapping[str, int], classes: int) -> int:
    if isinstance(label, str) and label in numbers:
        return numbers[label]
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < classes:
        return label
    known = ", ".join(list(numbers)[:5])
    raise BadInput(f"{where}: the model has no label {label!r}", fix=f"its labels are {known}, or 0 to {classes - 1}")
