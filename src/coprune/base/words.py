"""What a message says of settings and commands, as values: each face of the program names them in its own way.

A message for people is words: a string, one of the pieces below, or a tuple of both. In Python `Set("stream", False)`
reads `stream=False`; on the command line, which has a face of its own, `--no-stream`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Piece(Protocol):
    """A part of a message that depends on the face."""

    def said_in(self, face: Face) -> str:
        """The piece as text."""
        ...


Words = str | Piece | tuple[str | Piece, ...]


@dataclass(frozen=True)
class Setting:
    """A setting, whatever its value: `save_model=…`, `--save-model`."""

    name: str

    def said_in(self, face: Face) -> str:
        return face.setting(self.name)


@dataclass(frozen=True)
class Set:
    """A setting with a value: `stream=False`, `--no-stream`; the value `...` stands for one of the user's choice."""

    name: str
    value: Any

    def said_in(self, face: Face) -> str:
        return face.set(self.name, self.value)


@dataclass(frozen=True)
class LeaveOut:
    """Not to give a setting: `leave out stream`, `leave out --stream`."""

    name: str

    def said_in(self, face: Face) -> str:
        return f"leave out {face.name(self.name)}"


@dataclass(frozen=True)
class Together:
    """Several settings at once: `stream=True, batch_size=1`, `--stream --batch-size 1`."""

    settings: tuple[Set, ...]

    def said_in(self, face: Face) -> str:
        return face.between.join(setting.said_in(face) for setting in self.settings)


@dataclass(frozen=True, init=False)
class Command:
    """A call: `coprune.evaluate(folder, tasks=…)`, `coprune eval FOLDER --tasks …`.

    Args:
        name: the function's name.
        parts: what it is called with; text in capitals stands for something of the user's choice.
    """

    name: str
    parts: tuple[str | Path | Set, ...]

    def __init__(self, name: str, *parts: str | Path | Set) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "parts", parts)

    def said_in(self, face: Face) -> str:
        return face.command(self.name, self.parts)


class Face:
    """How settings and commands are named; this one names them as in Python."""

    between = ", "
    """What stands between settings that are given together."""

    def name(self, setting: str) -> str:
        """A setting's bare name."""
        return setting

    def setting(self, name: str) -> str:
        """A setting, to be given a value."""
        return f"{name}=…"

    def set(self, name: str, value: Any) -> str:
        """A setting with its value."""
        return self.setting(name) if value is ... else f"{name}={_literal(value)}"

    def command(self, name: str, parts: tuple[str | Path | Set, ...]) -> str:
        """A call."""
        return f"coprune.{name}({', '.join(self._argument(part) for part in parts)})"

    def _argument(self, part: str | Path | Set) -> str:
        if isinstance(part, Set):
            return part.said_in(self)
        return part.lower() if isinstance(part, str) and part.isupper() else _literal(part)


PYTHON = Face()
_speaking: list[Face] = [PYTHON]


@contextmanager
def speaking(face: Face) -> Iterator[None]:
    """Say all words in this process as a face does, while the body runs."""
    _speaking.append(face)
    try:
        yield
    finally:
        _speaking.pop()


def say(words: Words, face: Face | None = None) -> str:
    """Words as text.

    Args:
        words: the text and its pieces.
        face: which one speaks; by default the one that this process speaks as, which is Python's unless told otherwise.
    """
    chosen = face or _speaking[-1]
    return "".join(part if isinstance(part, str) else part.said_in(chosen) for part in parts_of(words))


def ended(text: str) -> str:
    """Text that ends like a sentence."""
    return text if text.endswith((".", "?", "!", "…")) else f"{text}."


def parts_of(words: Words) -> tuple[str | Piece, ...]:
    """The parts of words, also where they are a single one."""
    return words if isinstance(words, tuple) else (words,)


def _literal(value: Any) -> str:
    return repr(str(value) if isinstance(value, Path) else value)
