"""Events of a sweep's jobs; plain values that can be sent between processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coprune.base.errors import CopruneError
from coprune.base.words import duration, printable


@dataclass(frozen=True)
class Doing:
    """Current activity of a job."""

    run: str
    """The name of its run."""
    text: str


@dataclass(frozen=True)
class Done:
    """A job was done."""

    run: str
    saved: Mapping[str, float] = field(default_factory=dict)
    """Seconds of work that were taken over from other runs, by what it was."""


class Cause(StrEnum):
    """Why a job was not done."""

    REFUSED = "refused"
    """It would fail again the same way."""
    BROKEN = "broken"
    """An unforeseen error."""
    LOST = "lost"
    """The worker is gone."""


@dataclass(frozen=True)
class NotDone:
    """A job ended without being done."""

    run: str
    cause: Cause
    reason: str | CopruneError

    @property
    def text(self) -> str:
        """Reason in words."""
        return str(self.reason).strip()


JobEvent = Doing | Done | NotDone
Tell = Callable[[JobEvent], None]


_SHOWN = 12  # rows of runs on a terminal


@dataclass
class State:
    """State of a run. seconds: its time, once it has ended."""

    name: str
    kind: Literal["waiting", "running", "done", "failed"] = "waiting"
    text: str = ""
    since: float = 0.0
    seconds: float | None = None
    retries: int = 0


class Board:
    """Keeps the state of every run and shows it on standard error.

    names: of the runs to do; earlier: how many others were done before.
    """

    def __init__(self, names: Sequence[str], earlier: int, quiet: bool = False) -> None:
        self.states = {name: State(name) for name in names}
        self._earlier = earlier
        self.at_once = 1
        """How many runs go at once."""
        self._console = Console(stderr=True, quiet=quiet)
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table while the body runs, if there is a terminal."""
        if not self._console.is_terminal or self._console.quiet:
            yield
            return
        with Live(console=self._console, get_renderable=self.render, refresh_per_second=2, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def note(self, event: JobEvent, again: bool) -> None:
        """Take note of what happened to a run. again: whether it will be tried again."""
        state = self.states[event.run]
        if isinstance(event, Doing):
            if state.kind != "running":
                state.kind, state.since = "running", time.monotonic()
            state.text = event.text
            return
        state.seconds = time.monotonic() - state.since if state.since else None
        if isinstance(event, Done):
            state.kind, state.text = "done", ""
            took, done = duration(state.seconds or 0.0), self._earlier + self._count("done")
            self.say(f"done     {event.run}  {took}  ({done} of {self._all()})")
        elif again:
            state.kind, state.text, state.retries = "waiting", _last_line(event.text), state.retries + 1
            self.say(f"again    {event.run}  {state.text}")
        else:
            state.kind, state.text = "failed", _last_line(event.text)
            self.say(f"failed   {event.run}  {state.text}")

    def estimating(self, event: JobEvent, again: bool) -> None:
        """Take note of a run that is only estimated for now."""
        if isinstance(event, Doing):
            self.note(event, again)
        else:
            self.states[event.run] = State(event.run)

    def remaining(self) -> float | None:
        """Estimate the seconds until the last run ends from the mean of finished ones; None before one is done."""
        done = [state.seconds for state in self.states.values() if state.kind == "done" and state.seconds]
        if not done:
            return None
        mean, left = sum(done) / len(done), 0.0
        for state in self.states.values():
            if state.kind in ("waiting", "running"):
                left += max(0.0, mean - (time.monotonic() - state.since if state.kind == "running" else 0.0))
        return left / min(self.at_once, max(1, self._count("waiting") + self._count("running")))

    def render(self) -> Group:
        """Return the table as it is now."""
        table = Table(box=box.SIMPLE, pad_edge=False)
        for column in ("", "run", "time", ""):
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        running = [state for state in self.states.values() if state.kind == "running"]
        failed = [state for state in self.states.values() if state.kind == "failed"]
        done = [state for state in self.states.values() if state.kind == "done"]
        room = max(0, _SHOWN - len(running) - len(failed))
        for state in [*done[-room:], *failed, *running] if room else [*failed, *running]:
            seconds = time.monotonic() - state.since if state.kind == "running" else state.seconds
            again = f" (retry {state.retries})" if state.retries and state.kind == "running" else ""
            took = "" if seconds is None else duration(seconds)
            table.add_row(state.kind, Text(printable(state.name)), took, Text(printable(state.text + again)))
        return Group(table, Text(self._counts()))

    def _counts(self) -> str:
        left = self.remaining()
        told = "" if left is None else f"; about {duration(left)} left"
        return (
            f"{self._earlier + self._count('done')} of {self._all()} done, {self._count('running')} running, "
            f"{self._count('waiting')} waiting, {self._count('failed')} failed{told}"
        )

    def _count(self, kind: str) -> int:
        return sum(state.kind == kind for state in self.states.values())

    def _all(self) -> int:
        return self._earlier + len(self.states)

    def say(self, line: str) -> None:
        """Print a line, unless there is a live table."""
        if self._live is None:
            self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
