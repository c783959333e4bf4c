"""`coprune sweep`: many runs from one file or script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coprune.base.environment import importing
from coprune.base.validation import settings_of
from coprune.base.words import Command, Set, Words
from coprune.commands.grouped import with_value
from coprune.commands.options import ShortCommand, help_all_option, recipe_options, settings_options, with_options
from coprune.commands.terminal import show, show_next
from coprune.recipe.tree import FIELDS
from coprune.sweeps.execution_settings import ExecutionSettings
from coprune.sweeps.file import Sweep

if TYPE_CHECKING:
    from coprune.sweeps.sweep_result import SweepResult

_LOCAL = "local"


class SweepCommand(ShortCommand):
    """A command whose `--ray` may come without an address, for a local cluster."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Add the default to a `--ray` without an address."""
        return super().parse_args(ctx, with_value(args, "--ray", _LOCAL, _is_address))

    def is_shown_short(self, name: str) -> bool:
        """Return whether the short help shows a parameter: the sweep's own, not those of its runs."""
        return name not in FIELDS or name in ("model", "device")


def _is_address(word: str) -> bool:
    return not word.startswith("-") and (word in ("auto", _LOCAL) or ":" in word)


READ_WITH = {"cls": SweepCommand}


@with_options([*settings_options(ExecutionSettings), *recipe_options(), help_all_option()])
def sweep(
    file: Annotated[Path | None, typer.Argument(help="A recipe with lists (YAML).", show_default=False)] = None,
    script: Annotated[
        str | None,
        typer.Option(
            "--script",
            help="Run a batch script of the Wanda repository: llama-7b, …, opt or ablate-weight-update.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Use this model instead.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the commands of the runs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and lines.")] = False,
    **settings: Any,
) -> None:
    """Run every combination of a file's lists, several at a time, and collect the results in one table.

    Example file, 2 methods × 2 seeds (any option of prune may have a list; more in docs/sweeps.md):
    {model: smollm2-135m, dataset: embedded, seqlen: 512, method: [wanda, sparsegpt], seed: [0, 1], save: out/table}

    Options of prune (--help-all lists them) override the file for all runs. Run the same command again to resume.
    """
    typed = {name: value for name, value in settings.items() if value is not None}
    typed |= {"model": model} if model else {}
    settings_of(ExecutionSettings, {name: typed[name] for name in ExecutionSettings.model_fields if name in typed})
    if file is not None and script is None:
        Sweep.read(file)  # a mistake in it is told before torch is imported
    with importing():
        from coprune.sweeps.sweep_call import sweep

    found = sweep(file, script=script, dry_run=dry_run, quiet=quiet, **typed)
    if dry_run:
        show("\n".join(found.commands))
        said = ({"script": script} if script else {}) | typed
        named = [] if file is None else [file]
        run = Command("sweep", *named, *(Set(name, value) for name, value in said.items()))
        show_next(("run them: ", run), apart=True)
    else:
        _show(found)


def _show(found: SweepResult) -> None:
    """Print the tables and their paths. Exits with 3 if a requirement is not met.

    Raises CopruneError if a run failed.
    """
    from coprune.commands.terminal import console, end_unless_held
    from coprune.report.links import PAGE_FILE
    from coprune.sweeps.results import MARKDOWN, print_tables

    print_tables(found.sweep, found.runs, found.reports, console())
    show(found.ledger.line())
    show(f"results   {found.sweep.folder / MARKDOWN}")
    if found.reports:
        show(f"page      {found.sweep.folder / PAGE_FILE}")
    required = [(name, one) for name, report in found.reports.items() for one in report.required]
    for name, one in required:
        if not one.holds:
            show(f"required  {name}: {one.line()}")
    found.require_success()
    saved = any(report.saved_model is not None for report in found.reports.values())
    compared: Words = ("compare the models: ", Command("compare", found.sweep.folder))
    show_next(compared if saved else ("keep the models: run the same with ", Set("save_model", ...)))
    end_unless_held(one for _, one in required)
