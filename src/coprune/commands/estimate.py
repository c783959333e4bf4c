"""`coprune estimate`; its options are those of `coprune prune`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from coprune.base.environment import expand_home
from coprune.base.files import require_file
from coprune.base.progress import Reporter
from coprune.commands.grouped import with_value
from coprune.commands.options import ShortCommand, with_options
from coprune.commands.recipe_options import METHOD_OPTIONS, recipe_asked, run_as_typed, run_options
from coprune.commands.terminal import show, show_next
from coprune.recipe.presets import PRESETS

PRINTED = "-"


class EstimateCommand(ShortCommand):
    """A command whose `--json` may come without a file, for standard output."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Add the default to a `--json` without a file."""
        return super().parse_args(ctx, with_value(args, "--json", PRINTED, lambda word: word.endswith(".json")))


READ_WITH = {"context_settings": METHOD_OPTIONS, "cls": EstimateCommand}


@with_options(run_options())
def estimate(
    context: typer.Context,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="[FILE.json]",
            help="Also write all figures to this file; without one, print them as JSON.",
        ),
    ] = None,
    presets: Annotated[
        bool | None,
        typer.Option(
            "--presets/--no-presets", help="Also estimate every preset. [if no preset, method or recipe is named]"
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **typed: Any,
) -> None:
    """Give an upper bound on the memory that `coprune prune` would need here with the same options, without running it.

    Example: coprune estimate smollm2-135m --dataset embedded -p 2:4 --seqlen 512
    """
    file = None if json_file in (None, PRINTED) else expand_home(str(json_file))
    require_file(file, "json")
    reporter = Reporter(quiet)
    recipe = recipe_asked(context, typed, reporter)
    if presets is None:
        presets = all(typed[name] is None for name in ("preset", "method", "recipe"))
    others = {name: partial(recipe_asked, context, {**typed, "preset": name}, reporter) for name in PRESETS if presets}
    from coprune.base.files import write_text
    from coprune.runner.prune_call import estimate_recipe

    found = estimate_recipe(recipe, reporter, presets=others)
    show(found.to_json() if json_file == PRINTED else str(found))
    if file is not None:
        write_text(file, found.to_json() + "\n")
    if json_file != PRINTED:
        show_next(("run it: ", run_as_typed(context, typed)))
