"""`coprune estimate`, which takes the options of `coprune prune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from coprune.commands.asked import METHOD_OPTIONS, recipe_asked, run_options
from coprune.commands.options import with_options

READ_WITH = {"context_settings": METHOD_OPTIONS}


@with_options(run_options())
def estimate(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **typed: Any,
) -> None:
    """Tell how much memory and time `coprune prune` would take here with the same options, without doing it."""
    recipe = recipe_asked(context, typed)
    from coprune.base.progress import Reporter
    from coprune.run.prune import estimate_recipe

    found = estimate_recipe(recipe, Reporter(quiet))
    typer.echo(found.to_json() if as_json else str(found))
