"""The table of commands, each imported when it is asked for: `coprune --help` shows it without importing any."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from coprune.base.environment import expand_home
from coprune.base.words import Face, Set
from coprune.commands.grouped import GroupedCommand
from coprune.recipe.flags import flags_of

COMMANDS: dict[str, str] = {
    "prune": "Prune a model, measure what that did, and save it.",
    "methods": "List the pruning methods and their own options.",
    "inspect": "Show blocks and matrices, and what would be pruned.",
    "demo": "Prune a small model that needs no network, and show it.",
    "eval": "Measure a model's perplexity, or run tasks.",
    "estimate": "Bound the memory that a run would take here.",
    "sweep": "Do many runs, and collect what they found in a table.",
    "compare": "Compare models: size, perplexity, closeness, tasks.",
    "report": "Make a run's page again, or a page of several runs.",
    "fit": "Find the smallest file that still does your task.",
    "finetune": "Recover what pruning cost, with every zero kept.",
    "generate": "Let a model write a file to be calibrated on.",
    "merge": "Merge a masked adapter into its pruned model.",
    "pack": "Store a pruned model smaller, bit for bit the same.",
    "unpack": "Give back the dense folder that was packed.",
    "push": "Put a saved model on the Hugging Face Hub.",
    "export": "Write a model as a GGUF file for llama.cpp and others.",
    "bench": "Measure how fast models are on this machine.",
}
"""Every command, with its summary in one line of a narrow terminal. Its function is in the file of its name."""
CALLED = {"evaluate": "eval"}
"""Commands that are not called like their function, which is that of Python's face too."""


def command_named(name: str) -> Callable[..., None]:
    """Import a command's function. name: as in `COMMANDS`."""
    own = next((function for function, called in CALLED.items() if called == name), name)
    function: Callable[..., None] = getattr(import_module(f"coprune.commands.{own}"), own)
    return function


def _at_home(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command to expand `~` in its paths, which shells leave in `--output=~/page.html`."""

    @wraps(function)
    def called(*arguments: Any, **typed: Any) -> None:
        function(*arguments, **{name: _home_in(value) for name, value in typed.items()})

    return called


def _home_in(value: Any) -> Any:
    if isinstance(value, list):
        return [_home_in(one) for one in value]
    return expand_home(value) if isinstance(value, Path) else value


class _Parsers(Mapping[str, Any]):
    """Argument parsers of the commands, made on first use."""

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        function = command_named(name)
        # A command's file may override how its arguments are parsed.
        settings = getattr(import_module(function.__module__), "READ_WITH", {})
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name, **{"cls": GroupedCommand, **settings})(_at_home(function))
        return typer.main.get_command(alone)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(TyperGroup):
    """Shows the table without importing the commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": None})
        self.commands: Any = _Parsers()

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


class CommandLine(Face):
    """Settings are flags, calls are commands."""

    between = " "

    def __init__(self, command: str = "prune") -> None:
        """Speak to whoever typed a command, whose flags are named."""
        self._trains = command == "finetune"

    def name(self, setting: str) -> str:
        return flags_of(setting, self._trains)[0].partition("/")[0]

    def setting(self, name: str) -> str:
        return self.name(name)

    def set(self, name: str, value: Any) -> str:
        yes, _, no = flags_of(name, self._trains)[0].partition("/")
        if isinstance(value, bool):
            return yes if value else no or f"no {yes}"
        return f"{yes} {_word(value)}"

    def command(self, name: str, parts: tuple[str | Path | Set, ...]) -> str:
        said = [part.said_in(self) if isinstance(part, Set) else _word(part) for part in parts]
        return " ".join(["coprune", CALLED.get(name, name), *said])


def _word(value: Any) -> str:
    return "…" if value is ... else shlex.quote(str(value))
