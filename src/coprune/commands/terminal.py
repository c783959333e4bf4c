"""Terminal helpers of the commands: tables, result lines, and the exit code for an unmet requirement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import typer
from rich.console import Console

from coprune.base.words import Sheet, Words, printable, say

NOT_AS_REQUIRED = 3
_NO_EDGE = 10_000  # columns


class Requirement(Protocol):
    """A requirement on a model."""

    @property
    def holds(self) -> bool: ...


def end_unless_held(required: Iterable[Requirement]) -> None:
    """Exit with code 3 if a requirement is not met; all output is saved by then."""
    if not all(one.holds for one in required):
        raise typer.Exit(NOT_AS_REQUIRED)


def console() -> Console:
    """Return a console for standard output; outside a terminal a table row stays on one line."""
    found = Console()
    return found if found.is_terminal else Console(width=_NO_EDGE)


def print_sheet(sheet: Sheet) -> None:
    """Print a table with named columns, folded where the terminal is narrower."""
    console().print(sheet.terminal())


def show(text: str) -> None:
    """Print a result on standard output."""
    typer.echo(printable(text))


def show_next(words: Words, apart: bool = False) -> None:
    """Print what to type next, as the last line; on standard error if it is apart from a result that may be piped on."""
    (tell if apart else show)(f"next      {say(words)}")


def tell(text: str) -> None:
    """Print a message on standard error."""
    typer.echo(printable(text), err=True)
