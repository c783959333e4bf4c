"""`--help` of a command: options in groups, as wide as the terminal, each with its current names only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand

from coprune.recipe.flags import ALIASES

WIDEST = 160
"""Columns; longer lines are hard to read."""
UNGROUPED = "Options"
"""Title of the options without a group."""


def with_value(arguments: Sequence[str], flag: str, value: str, is_value: Callable[[str], bool]) -> list[str]:
    """Return the arguments with a default value added to a flag without one. is_value: whether a word is a value of the flag."""
    complete = list(arguments)
    for index, word in enumerate(arguments):
        following = arguments[index + 1 : index + 2]
        if word == flag and not (following and is_value(following[0])):
            complete[index] = f"{flag}={value}"
    return complete


class GroupedCommand(TyperCommand):
    """A command that shows its options in groups."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments as typer does."""
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, the command's own options, and the groups."""
        for title, rows in self.groups(ctx).items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def groups(self, ctx: Any, shown: Callable[[str], bool] = lambda name: True) -> dict[str, list[tuple[str, str]]]:
        """Return the option groups: by title, each option's names and its help.

        shown: whether to include an option, by its parameter's name.
        """
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], UNGROUPED: []}
        for param in self.get_params(ctx):
            if not shown(param.name):
                continue
            with _by_todays_names(param):
                record = param.get_help_record(ctx)
            if record is not None:
                argument = param.param_type_name == "argument"
                title = "Arguments" if argument else getattr(param, "rich_help_panel", None) or UNGROUPED
                groups.setdefault(title, []).append(record)
        return {title: rows for title, rows in groups.items() if rows}


@contextmanager
def _by_todays_names(param: Any) -> Iterator[None]:
    """Hide an option's aliases within the body."""
    before = param.opts
    param.opts = [name for name in before if name.removeprefix("--").replace("-", "_") not in ALIASES]
    try:
        yield
    finally:
        param.opts = before
