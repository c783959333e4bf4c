"""Checks of an untrusted `tokenizer.json`, which could make the tokenizers library run out of time or memory.

Its regular expressions are tried with that library, unusual ones in a child process with limited memory and time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex
from tokenizers.normalizers import Replace

from coprune.base.errors import BadInput, panics_caught
from coprune.base.files import read_given
from coprune.base.limited import SECONDS, Child, render_limited

_MOST_GROWTH, _HUGE = 32, 10**9
_LENGTH = 64
"""Length of the texts on which patterns are tried."""
_CHILDREN: dict[str, Child] = {}
_REPEATED = re.compile(r"[)*+?}][*+{]|\{\d{3,}|\{\d*,\d{3,}|\(\?[#x]|\\[gk1-9]")
"""Constructs that can take very many steps on a short text: repeated groups and repetitions, large counts, references."""


def check_tokenizer(file: Path) -> None:
    """Raise BadInput for a tokenizer that can lengthen a text many times, or whose patterns exceed the limits."""
    try:
        content = json.loads(read_given(file))
        steps = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor")]
        patterns = sorted({pattern for step in steps for pattern in _patterns(step)})
    except BadInput:
        raise
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # not a tokenizer's file; the reader reports it
    empty = _tried(file, patterns)
    try:
        times = max(_growth(step, empty) for step in steps)
    except (AttributeError, TypeError, KeyError):
        return
    if times > _MOST_GROWTH:
        raise BadInput(
            f"{file} lengthens a text up to {times:,} times, which no real tokenizer does", fix="fetch the model again"
        )


def _patterns(step: Any) -> Iterator[str]:
    """Yield the regular expressions of a step of a tokenizer."""
    for key, value in step.items() if isinstance(step, Mapping) else enumerate(step if isinstance(step, list) else ()):
        if key == "Regex" and isinstance(value, str):
            yield value
        else:
            yield from _patterns(value)


def _tried(file: Path, patterns: Sequence[str]) -> set[str]:
    """Return the patterns that can match the empty string. Raises BadInput if one exceeds the limits."""
    unusual = [pattern for pattern in patterns if _REPEATED.search(pattern)]
    usual = [pattern for pattern in patterns if pattern not in unusual]
    try:
        with panics_caught():
            answers = [matches_nothing(pattern) for pattern in usual] + _tried_apart(unusual)
    except ValueError as error:
        longest = max(unusual or usual, key=len)
        raise BadInput(
            f"{file} holds a pattern that takes too many steps, more than {SECONDS} seconds or a gigabyte of "
            f"memory for a few letters: {longest[:100]!r}, or another one",
            fix="fetch the model again",
        ) from error
    return {pattern for pattern, empty in zip([*usual, *unusual], answers, strict=True) if empty}


def _tried_apart(patterns: Sequence[str]) -> list[bool]:
    """Try patterns in a child process. Raises ValueError if it did not finish."""
    return list(json.loads(render_limited(_CHILDREN, "patterns", _answers, (patterns,)))) if patterns else []


def _answers(patterns: Sequence[str]) -> str:
    return json.dumps([matches_nothing(pattern) for pattern in patterns])


def matches_nothing(pattern: str) -> bool:
    """Return whether a pattern can match the empty string; False for an invalid one, which the loader reports."""
    try:
        replace = Replace(Regex(pattern), "x")
    except Exception:  # the library raises plain Exception
        return False
    # Replacing an empty match by one character lengthens the text; any other match does not.
    return any(len(replace.normalize_str(text)) > len(text) for text in _texts(pattern))


def _texts(pattern: str) -> list[str]:
    """Return texts that could make a pattern backtrack: runs of its own and common characters with a different end."""
    letters = dict.fromkeys([*"a0 \n", *pattern])
    return ["a b", *(letter * _LENGTH + "\0" for letter in list(letters)[:_LENGTH])]


def _growth(step: Any, empty: set[str]) -> int:
    """Return the factor by which a step may lengthen a text. empty: patterns that match the empty string."""
    if not isinstance(step, Mapping):
        return 1
    inner = [one for value in step.values() if isinstance(value, list) for one in value]
    if step.get("type") == "TemplateProcessing":
        return sum(len(one["ids"]) for one in step["special_tokens"].values())
    if step.get("type") == "Replace":
        pattern, content = step["pattern"], len(step["content"])
        if "String" in pattern:
            return max(1, -(-content // max(1, len(pattern["String"]))))
        return content + 1 if pattern["Regex"] in empty else max(1, content)
    if step.get("type") == "Prepend":
        return 1 + len(step["prepend"])
    return min(math.prod(_growth(one, empty) for one in inner), _HUGE)
