"""The table of commands, which `coprune --help` shows without importing any; each is imported on first use."""

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
    "demo": "Prune a small packaged model, and show the effect.",
    "inspect": "Show a model's matrices, and what could be removed.",
    "fit": "Find the smallest file that still does your task.",
    "prune": "Prune a model, measure the effect, and save it.",
    "finetune": "Recover accuracy lost to pruning, keeping zeros.",
    "export": "Write a model as a GGUF file for llama.cpp and others.",
    "eval": "Measure a model's perplexity, or run tasks.",
    "compare": "Compare models: size, perplexity, closeness, tasks.",
    "bench": "Measure how fast models run on this machine.",
    "estimate": "Give an upper bound on the memory of a run.",
    "sweep": "Run a grid of settings and tabulate the results.",
    "report": "Rebuild a run's page, or make one of several runs.",
    "methods": "List the pruning methods and their options.",
    "generate": "Generate calibration text with a model.",
    "merge": "Merge a masked adapter into its pruned model.",
    "push": "Upload a saved model to the Hugging Face Hub.",
}
"""Summary of every command, one line in a narrow terminal; its function is in the file of the same name."""

_ELSEWHERE = {
    "quantize": Command("export", "MODEL", "OUT.gguf", Set("type", "q4_k_m"), Set("imatrix", "auto")),
    "convert": Command("export", "MODEL", "OUT.gguf"),
    "train": Command("finetune", "FOLDER"),
}
"""Commands of other tools, and their equivalent here."""


def command_named(name: str) -> Callable[..., None]:
    """Import a command's function. name: a key of `COMMANDS`."""
    own = next((function for function, called in CALLED.items() if called == name), name)
    function: Callable[..., None] = getattr(import_module(f"coprune.commands.{own}"), own)
    return function


def _at_home(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command to expand `~` in its paths; shells leave it alone in `--output=~/page.html`."""

    @wraps(function)
    def called(*arguments: Any, **typed: Any) -> None:
        function(*arguments, **{name: _home_in(value) for name, value in typed.items()})

    return called


def _home_in(value: Any) -> Any:
    if isinstance(value, list):
        return [_home_in(one) for one in value]
    return expand_home(value) if isinstance(value, Path) else value


class _Parsers(Mapping[str, Any]):
    """The commands' argument parsers, made on first use."""

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        function = command_named(name)
        # A command's module may override how its arguments are parsed.
        settings = getattr(import_module(function.__module__), "READ_WITH", {})
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name, **{"cls": GroupedCommand, **settings})(_at_home(function))
        return typer.main.get_command(alone)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def option_of_another(flag: str, command: str) -> BadInput | None:
    """Return the error for an option that only other commands have, or None. flag: such as `--budget`."""
    parsers = _Parsers()
    having = [name for name in COMMANDS if any(flag in (*p.opts, *p.secondary_opts) for p in parsers[name].params)]
    if not having or command in having:
        return None
    return BadInput(f"{command} has no option {flag}", value=flag, fix=f"it belongs to coprune {', '.join(having)}")


class Commands(TyperGroup):
    """The command group, which shows its table without importing the commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": None})
        self.commands: Any = _Parsers()

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was typed. Raises BadInput for other tools' names."""
        if (here := _ELSEWHERE.get(args[0].replace("quantise", "quantize"))) is not None:
            raise BadInput(f"there is no command {args[0]}", value=args[0], fix=("type: ", here))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))
