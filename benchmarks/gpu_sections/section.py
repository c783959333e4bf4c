"""What a section is, and helpers that all sections share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SIMULATED = "sim"
ENDING = "section-ended: "
"""Begins the line that is a section's result."""
Result = tuple[bool | None, str]
"""Whether it passed (None where there was nothing to do here), and one line for people."""


@dataclass(frozen=True)
class Asked:
    """The options of a section."""

    device: str
    seconds: float
    """How long it may take."""
    tiny: bool
    folder: Path
    """Shared by all sections."""
    cases: str
    """Words of cases, apart by commas; `few` for those of every run of the tests; empty for all."""


class Section(NamedTuple):
    """A part of the benchmark; its function is imported only in the section's own process."""

    title: str
    place: str
    """module:function, within this package."""
    seconds: float
    """At most, on a GPU."""
    proves: bool
    """Whether it shows that results are right; others measure."""

    def run(self, asked: Asked) -> Result:
        module, _, name = self.place.partition(":")
        work: Callable[[Asked], Result] = getattr(importlib.import_module(f"gpu_sections.{module}"), name)
        return work(asked)


def head(*columns: str) -> None:
    """Print a table's head; columns whose names begin with a blank are text, all others numbers."""
    print(f"| {' | '.join(column.strip() for column in columns)} |")
    print(
        f"| {' | '.join('---' if column.startswith(' ') or not column else '---:' for column in columns)} |", flush=True
    )


def row(*cells: object) -> None:
    """Print a row."""
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def mib(nbytes: int | None) -> str:
    return "–" if nbytes is None else f"{nbytes / 2**20:,.0f}"


def middle(values: Iterable[float]) -> float:
    """The median."""
    ordered: Sequence[float] = sorted(values)
    return ordered[len(ordered) // 2]
