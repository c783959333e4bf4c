"""How a result shows itself: in one line where Python shows values, in a few when it is printed, as HTML in a notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Text whose control characters stand as their escapes: by them, what others wrote could steer a terminal."""
    return text.translate(_CONTROLS)


def per_cent(share: float, digits: int = 2, signed: bool = False) -> str:
    """A share as it is written everywhere: 0.5 is `50.00 %`."""
    return f"{100 * share:{'+' if signed else ''}.{digits}f} %"


class Sheet(NamedTuple):
    """A small table for people.

    Without `columns` it is a list of names and values.
    """

    title: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()

    def html(self) -> str:
        """The table as HTML, with every text escaped."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = [f"<tr>{head}</tr>"] if head else []
        for name, *cells in self.rows:
            values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            rows.append(f'<tr><th style="text-align:left">{escape(name)}</th>{values}</tr>')
        return f"<table><caption>{escape(self.title)}</caption>{''.join(rows)}</table>"

    def lines(self) -> list[str]:
        """Names and values as lines, or named columns below each other."""
        if not self.columns:
            return [f"{name:<9} {' '.join(cells)}" for name, *cells in self.rows]
        table = [self.columns, *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.columns))]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]


class Shown(ABC):
    """A result that shows itself: what derives from it says what there is to see.

    `print` shows what the command prints.
    """

    @abstractmethod
    def headline(self) -> str:
        """What it is, in one short line."""

    @abstractmethod
    def sheet(self) -> Sheet:
        """What it holds, in a few figures."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.headline()}>"

    def __str__(self) -> str:
        return "\n".join(self.sheet().lines())

    def _repr_html_(self) -> str:
        return self.sheet().html()
