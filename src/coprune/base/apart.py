"""A folder that nobody named: one of its own for every run, whose name follows what differs from the run that is there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

_MOST_LETTERS = 80
_OF_A_VALUE = 30
_BESIDES = ("given", "not given")  # of what only matters whether it is there


def folder_apart(
    folder: Path, settings: Mapping[str, Any], settings_in: Callable[[Path], Mapping[str, Any] | None]
) -> tuple[Path, list[str]]:
    """A folder for a run: the usual one, unless that holds a run with other settings.

    Args:
        folder: the usual one.
        settings: what decides the run.
        settings_in: the same of the run in a folder; None where there is none, and whatever differs where that is unknown.

    Returns:
        The folder, which may hold an earlier run of the same settings; and the names of the settings in which the run of
        the usual folder differs.
    """
    there = settings_in(folder)
    differing = [] if there is None else _differing(settings, there)
    if not differing:
        return folder, []
    # That something is wanted besides is in the name only if nothing else differs.
    telling = [name for name in differing if settings[name] not in _BESIDES] or differing
    stem = f"{folder.name}-{_short('-'.join(_word(name, settings[name]) for name in telling))}"
    for number in count(1):
        own = folder.with_name(stem if number == 1 else f"{stem}-{number}")
        there = settings_in(own)
        if there is None or not _differing(settings, there):
            return own, differing
    raise AssertionError("numbers do not end")


def _differing(settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    return [name for name in settings if settings[name] != others.get(name)]


def _word(name: str, value: Any) -> str:
    """A setting with its value, as a part of a folder's name."""
    word = name.replace("_", "-")
    if value is True or value == _BESIDES[0]:
        return word
    if value is None or value is False or value in ((), [], "", _BESIDES[1]):
        return f"no-{word}"
    values = value if isinstance(value, list | tuple) else [value]
    said = "-".join("-".join(Path(str(one)).parts[-2:]) for one in values)
    return f"{word}-{re.sub(r'[^a-zA-Z0-9.=+]+', '-', said).strip('-')[:_OF_A_VALUE]}"


def _short(words: str) -> str:
    if len(words) <= _MOST_LETTERS:
        return words
    return f"{words[: _MOST_LETTERS - 9]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
