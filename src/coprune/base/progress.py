"""Progress bars with a remaining time, on standard error, so that results can be piped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

Advance = Callable[[float], None]
NO_BAR: AbstractContextManager[Advance] = nullcontext(lambda amount: None)
"""In place of a bar where there is nothing to wait for."""


@dataclass(frozen=True)
class Event:
    """Something that happened, of which those who listen are told."""

    kind: ClassVar[str]
    """What a log calls it."""

    def facts(self) -> dict[str, Any]:
        """What a log says of it: by default its fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Said(Event):
    """A line was said to people."""

    kind: ClassVar[str] = "line"
    text: str


Listener = Callable[[Event], None]


class Reporter:
    """Says what a run is doing: lines and bars for people, or nothing at all."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self.listeners: list[Listener] = []
        """Are told of every event, whether people are shown anything or not."""

    def tell(self, event: Event) -> None:
        """Tell the listeners that something happened."""
        for listener in self.listeners:
            listener(event)

    def say(self, line: str) -> None:
        """Print one line of plain text."""
        self._console.print(line, markup=False, highlight=False)
        self.tell(Said(line))

    @contextmanager
    def bar(self, description: str, total: float) -> Iterator[Advance]:
        """Show a bar while the body runs; the body calls what it is given with the amount done."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            Remaining(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(description, total=total)

            def advance(amount: float) -> None:
                progress.advance(task, amount)

            yield advance
            progress.update(task, completed=total)
