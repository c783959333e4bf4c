"""Messages about settings and commands as values, which each interface renders in its own way.

A message for people is words: a string, one of the pieces below, or a tuple of both. In Python `Set("stream", False)`
reads `stream=False`; on the command line `--no-stream`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from coprune.base.markdown import inline

if TYPE_CHECKING:
    from rich.table import Table


class Piece(Protocol):
    """A part of a message that depends on the interface."""

    def said_in(self, face: Face) -> str:
        """Return the piece as text."""
        ...


Words = str | Piece | tuple[str | Piece, ...]


@dataclass(frozen=True)
class Setting:
    """A setting without a particular value: `save_model=…`, `--save-model`."""

    name: str

    def said_in(self, face: Face) -> str:
        return face.setting(self.name)


@dataclass(frozen=True)
class Set:
    """A setting with a value: `stream=False`, `--no-stream`; the value `...` is for the user to choose."""

    name: str
    value: Any

    def said_in(self, face: Face) -> str:
        return face.set(self.name, self.value)


@dataclass(frozen=True)
class LeaveOut:
    """The advice to drop a setting: `leave out stream`, `leave out --stream`."""

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
        parts: its arguments; text in capitals is for the user to choose.
    """

    name: str
    parts: tuple[str | Path | Set, ...]

    def __init__(self, name: str, *parts: str | Path | Set) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "parts", parts)

    def said_in(self, face: Face) -> str:
        return face.command(self.name, self.parts)


class Face:
    """Names of settings and commands in an interface; this class is Python's."""

    between = ", "
    """Separator between settings."""

    def name(self, setting: str) -> str:
        """Return a setting's name."""
        return setting

    def setting(self, name: str) -> str:
        """Return a setting that needs a value."""
        return f"{name}=…"

    def set(self, name: str, value: Any) -> str:
        """Return a setting with its value."""
        return self.setting(name) if value is ... else f"{name}={_literal(value)}"

    def command(self, name: str, parts: tuple[str | Path | Set, ...]) -> str:
        """Return a command with its settings."""
        return f"coprune.{name}({', '.join(self._argument(part) for part in parts)})"

    def _argument(self, part: str | Path | Set) -> str:
        if isinstance(part, Set):
            return part.said_in(self)
        return part.lower() if isinstance(part, str) and part.isupper() else _literal(part)


PYTHON = Face()
_speaking: list[Face] = [PYTHON]


@contextmanager
def speaking(face: Face) -> Iterator[None]:
    """Render all messages of this process for one interface in the body."""
    _speaking.append(face)
    try:
        yield
    finally:
        _speaking.pop()


def say(words: Words, face: Face | None = None) -> str:
    """Render words as text.

    Args:
        words: the text and its pieces.
        face: the interface; by default the process's own, which is Python's unless set.
    """
    chosen = face or _speaking[-1]
    return "".join(part if isinstance(part, str) else part.said_in(chosen) for part in parts_of(words))


def ended(text: str) -> str:
    """Return a text that ends like a sentence."""
    return text if text.endswith((".", "?", "!", "…")) else f"{text}."


def parts_of(words: Words) -> tuple[str | Piece, ...]:
    """Return the parts of words, or a single one."""
    return words if isinstance(words, tuple) else (words,)


def renamed(words: Words, names: Mapping[str, str]) -> Words:
    """Return words with settings renamed. names: new ones by old ones."""

    def other(part: str | Piece) -> str | Piece:
        if isinstance(part, Setting | Set | LeaveOut):
            return replace(part, name=names.get(part.name, part.name))
        if isinstance(part, Together):
            return Together(tuple(replace(one, name=names.get(one.name, one.name)) for one in part.settings))
        return part

    return tuple(map(other, parts_of(words)))


def _literal(value: Any) -> str:
    return repr(str(value) if isinstance(value, Path) else value)


_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Escape control characters, which could steer the terminal in foreign text."""
    return text.translate(_CONTROLS)


def per_cent(share: float, digits: int = 2, signed: bool = False) -> str:
    """Return a share as written everywhere: 0.5 is `50.00 %`."""
    return f"{100 * share:{'+' if signed else ''}.{digits}f} %"


Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Cell:
    """A table cell, optionally emphasised or linked to a page."""

    text: str
    strong: bool = False
    link: str | None = None

    def __str__(self) -> str:
        return self.text


class Sheet(NamedTuple):
    """A table, or without `columns` a list of names and values: the first column holds names, the others figures.

    It is shown as HTML in pages and notebooks, as Markdown in cards and files, and in a terminal.
    """

    title: str
    rows: Sequence[Sequence[str | Cell]]
    columns: Sequence[str] = ()

    @classmethod
    def of(cls, facts: Iterable[Fact], columns: Mapping[str, Callable[[Fact], str | Cell]]) -> Sheet:
        """Return a table with a row per fact. columns: titles, each with the function that gives a fact's cell."""
        return cls("", [[show(fact) for show in columns.values()] for fact in facts], tuple(columns))

    def cells(self) -> list[list[Cell]]:
        """Return all rows."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]

    def html(self) -> str:
        """Return the table as HTML, with every text escaped."""
        from coprune.base.templating import macro  # with jinja2, which takes a while

        return macro("base/templates/table.html.j2", "table", self)

    def markdown(self) -> str:
        """Return the table as Markdown, with every text escaped."""
        rows = [[f"**{inline(c.text)}**" if c.strong else inline(c.text) for c in row] for row in self.cells()]
        lines = [list(map(inline, self.columns)), ["---", *["---:"] * (len(self.columns) - 1)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def terminal(self) -> Table:
        """Return the table for a terminal, folded where that is narrower."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE, pad_edge=False)
        for place, column in enumerate(self.columns):
            table.add_column(Text(printable(column)), justify="right" if place else "left", overflow="fold")
        for row in self.cells():  # a text may look like rich's markup
            table.add_row(*(Text(printable(cell.text), "bold" if cell.strong else "") for cell in row))
        return table

    def lines(self) -> list[str]:
        """Return names and values as lines, or named columns below each other."""
        if not self.columns:
            return [f"{name!s:<9} {' '.join(map(str, cells))}" for name, *cells in self.rows]
        table: list[Sequence[str]] = [self.columns, *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.columns))]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]


class Shown(ABC):
    """Base class of results that can display themselves.

    `print` shows the output of the command.
    """

    @abstractmethod
    def headline(self) -> str:
        """Return a summary of one short line."""

    @abstractmethod
    def sheet(self) -> Sheet:
        """Return the main figures."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.headline()}>"

    def __str__(self) -> str:
        return "\n".join(self.sheet().lines())

    def _repr_html_(self) -> str:
        return self.sheet().html()


def duration(seconds: float) -> str:
    """Format a time for display."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
