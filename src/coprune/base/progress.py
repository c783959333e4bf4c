"""Progress on standard error, so that results can be piped: lines and bars on a terminal, a line a minute in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from coprune.base.words import printable

Advance = Callable[[float], None]
NO_BAR: AbstractContextManager[Advance] = nullcontext(lambda amount: None)
"""Progress bar for work without waiting time."""
_LINE_SECONDS = 60.0
_WORDS, _BAR = 28, 40  # minimum columns of a bar's description, and maximum columns of the bar
_BESIDE = 30  # columns of the figures beside it


def scaled(advance: Advance, by: float) -> Advance:
    """Return a progress callback in another unit. by: one of its units in those of `advance`."""
    return lambda amount: advance(amount * by)


@dataclass(frozen=True)
class Event:
    """An event that listeners receive."""

    kind: ClassVar[str]
    """Name of the event in a log."""

    def facts(self) -> dict[str, Any]:
        """Return the event's fields for a log; by default all of them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Said(Event):
    """A line was printed."""

    kind: ClassVar[str] = "line"
    text: str


Listener = Callable[[Event], None]


class Reporter:
    """Progress of a run, as lines and bars, or silent."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._console = Console(stderr=True, quiet=quiet)
        self._once: set[str] = set()
        self.listeners: list[Listener] = []
        """Called with every event, even if quiet."""

    def tell(self, event: Event) -> None:
        """Send an event to the listeners."""
        for listener in self.listeners:
            listener(event)

    def say(self, line: str) -> None:
        """Print one line of plain text."""
        self._show(line)
        self.tell(Said(line))

    def say_once(self, line: str) -> None:
        """Print a line unless it was printed before."""
        if line not in self._once:
            self._once.add(line)
            self.say(line)

    def _show(self, line: str) -> None:
        # A terminal wraps by itself, and in a log a line stays one.
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, description: str, total: float) -> Iterator[Advance]:
        """Show a bar while the body runs, or a line per minute without a terminal.

        The body calls the yielded function with the amount done.
        """
        if not self._console.is_terminal:
            yield self._lines(description, total)
            return
        words = shortened(printable(description), max(_WORDS, self._console.width - _BESIDE - _BAR // 2))
        columns = (
            SpinnerColumn(),
            TextColumn(f"{{task.description:<{_WORDS}}}", markup=False),
            BarColumn(max(8, min(_BAR, self._console.width - _BESIDE - max(_WORDS, len(words))))),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            Remaining(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(words, total=total)

            def advance(amount: float) -> None:
                progress.advance(task, amount)

            yield advance
            progress.update(task, completed=total)

    def _lines(self, description: str, total: float) -> Advance:
        started = said = time.monotonic()
        done = 0.0

        def advance(amount: float) -> None:
            nonlocal done, said
            done, now = done + amount, time.monotonic()
            if now - said >= _LINE_SECONDS and 0 < done < total:
                said, share = now, done / total
                left = (now - started) * (1 / share - 1)
                self._show(
                    f"{description}: {100 * share:.0f} % after {_time(now - started)}, about {_time(left)} left."
                )

        return advance

    @contextmanager
    def libraries(self) -> Iterator[None]:
        """Hide the download bars of libraries in the body if this reporter is quiet."""
        from huggingface_hub import utils

        with bars_hidden(utils, self.quiet):
            yield


@contextmanager
def bars_hidden(library: Any, wanted: bool) -> Iterator[None]:
    """Hide a library's bars while the body runs, if that is wanted.

    Args:
        library: a module with what huggingface_hub.utils and datasets.utils call are_progress_bars_disabled,
            disable_progress_bars and enable_progress_bars.
        wanted: whether to hide them; those that are hidden already stay so.
    """
    hides = wanted and not library.are_progress_bars_disabled()
    if hides:
        library.disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            library.enable_progress_bars()


def shortened(text: str, width: int) -> str:
    """Return a text, cut in the middle if too long, since the end of a path is the most informative."""
    if len(text) <= width:
        return text
    end = (width - 1) * 2 // 3
    return f"{text[: width - 1 - end]}…{text[-end:]}"


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "a minute"
