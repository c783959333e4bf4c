"""The table of commands, each imported when it is asked for: `coprune --help` shows it without importing any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.words import Command, Set
from coprune.commands.grouped import GroupedCommand
from coprune.recipe.flags import CALLED

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
    "push": "Put a saved model on the Hugging Face Hub.",
    "export": "Write a model as a GGUF file for llama.cpp and others.",
    "bench": "Measure how fast models are on this machine.",
}
"""Every command, with its summary in one line of a narrow terminal. Its function is in the file of its name."""

_ELSEWHERE = {
    "quantize": Command("export", "MODEL", "OUT.gguf", Set("type", "q4_k_m"), Set("imatrix", "auto")),
    "convert": Command("export", "MODEL", "OUT.gguf"),
    "train": Command("finetune", "FOLDER"),
}
"""What other tools call a command, and what it is here."""


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


def option_of_another(flag: str, command: str) -> BadInput | None:
    """Return the error for an option that other commands have; None for any other. flag: such as `--budget`."""
    parsers = _Parsers()
    having = [name for name in COMMANDS if any(flag in (*p.opts, *p.secondary_opts) for p in parsers[name].params)]
    if not having or command in having:
        return None
    return BadInput(f"{command} has no option {flag}", value=flag, fix=f"it is one of coprune {', '.join(having)}")


class Commands(TyperGroup):
    """Shows the table without importing the commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": None})
        self.commands: Any = _Parsers()

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was typed. Raises BadInput for what other tools call one."""
        if (here := _ELSEWHERE.get(args[0].replace("quantise", "quantize"))) is not None:
            raise BadInput(f"there is no command {args[0]}", value=args[0], fix=("type: ", here))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))
