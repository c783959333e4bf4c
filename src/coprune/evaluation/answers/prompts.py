"""Prompts that models answer: our own, which lie beside this file, or those of a file of the user's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from coprune.base.errors import BadInput
from coprune.data.local_text import split_column

BUILTIN = "builtin"
_COLUMN = "prompt"
_OWN_FILE = "prompts.jsonl"
_EXAMPLE = 'A line reads like {"prompt": "Why is the sky blue?"}'


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
        asked: `builtin`, or a .jsonl file whose rows have a column `prompt`; `file:column` names another column.
        count: use only so many, evenly spaced, so that every field and language stays in.

    Raises:
        BadInput: there is no such file, it holds no prompt, or a row lacks the column or has no text there.
    """
    if asked == BUILTIN:
        return Prompts(BUILTIN, _spaced([row[_COLUMN] for row in _own_rows()], count))
    path, column = split_column(asked)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        fix = f"give a .jsonl file, or {BUILTIN} for prompts of several fields and languages"
        reason = error.strerror or error
        raise BadInput(f"the prompts {path} cannot be read: {reason}", field="generate", value=asked, fix=fix) from None
    except UnicodeDecodeError:
        raise BadInput(f"the prompts {path} are not UTF-8", field="generate", value=asked) from None
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise BadInput(f"the file {path} holds no prompts", field="generate", value=asked, fix=_EXAMPLE)
    return Prompts(str(path), _spaced([_prompt_of(path, *line, column or _COLUMN) for line in lines], count))


def short_prompts() -> Prompts:
    """The few of our own that every run which saves a model looks at."""
    return Prompts(BUILTIN, tuple(row[_COLUMN] for row in _own_rows() if row.get("gate")))


def _own_rows() -> list[dict[str, Any]]:
    content = (files("coprune.evaluation.answers") / _OWN_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def _spaced(prompts: Sequence[str], count: int | None) -> tuple[str, ...]:
    if count is None or count >= len(prompts):
        return tuple(prompts)
    return tuple(prompts[place * len(prompts) // count] for place in range(count))


def _prompt_of(path: Path, number: int, line: str, column: str) -> str:
    place = f"line {number} of {path}"
    try:
        row = json.loads(line)
    except ValueError:
        raise BadInput(f"{place} is no JSON", field="generate", value=str(path), fix=_EXAMPLE) from None
    if not isinstance(row, dict) or column not in row:
        has = f", only {', '.join(map(str, row))}" if isinstance(row, dict) and row else ""
        fix = f"name another column as in {path}:COLUMN. {_EXAMPLE}"
        raise BadInput(f"{place} has no column {column!r}{has}", field="generate", value=str(path), fix=fix)
    prompt = row[column]
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadInput(f"{place} has no text in the column {column!r}", field="generate", value=str(path), fix=_EXAMPLE)
    return prompt
