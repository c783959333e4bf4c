"""Prompts that models answer: our own, which lie beside this file, or those of a file of the user's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from coprune.base.errors import BadInput, about
from coprune.data import conversations
from coprune.data.local_text import split_column

BUILTIN = "builtin"
_OWN_FILE = "prompts.jsonl"


@dataclass(frozen=True)
class Prompts:
    """Prompts in order, and where they are from."""

    source: str
    texts: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Names the prompts by what they say: 16 hex digits."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:16]


def read_prompts(asked: str, count: int | None = None) -> Prompts:
    """Read prompts.

    Args:
        asked: `builtin`, or a file of them (`coprune.data.conversations.read_prompts`), each a single question.
        count: use only so many, evenly spaced, so that every field and language stays in.

    Raises:
        BadInput: there is no such file, it holds no prompt, or a row lacks the column or has no text there.
    """
    if asked == BUILTIN:
        return Prompts(BUILTIN, _spaced([row["prompt"] for row in _own_rows()], count))
    with about("generate", asked):
        found = conversations.read_prompts(asked, instead=f", or {BUILTIN} for prompts of several fields and languages")
        texts = [_question(prompt, number, asked) for number, prompt in enumerate(found, start=1)]
    return Prompts(str(split_column(asked)[0]), _spaced(texts, count))


def _question(prompt: str | list[conversations.Message], number: int, asked: str) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) > 1:
        several = f"row {number} of {asked} is a conversation of several turns"
        raise BadInput(several, fix="leave its last question alone")
    return prompt[0]["content"]


def short_prompts() -> Prompts:
    """The few of our own that every run which saves a model looks at."""
    return Prompts(BUILTIN, tuple(row["prompt"] for row in _own_rows() if row.get("gate")))


def _own_rows() -> list[dict[str, Any]]:
    content = (files("coprune.evaluation.answers") / _OWN_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def _spaced(prompts: Sequence[str], count: int | None) -> tuple[str, ...]:
    if count is None or count >= len(prompts):
        return tuple(prompts)
    return tuple(prompts[place * len(prompts) // count] for place in range(count))
