"""`coprune prune`: its options are the settings of a recipe, and the method's own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from coprune.commands.asked import METHOD_OPTIONS, recipe_asked, run_options
from coprune.commands.options import with_options
from coprune.commands.terminal import end_unless_held

READ_WITH = {"context_settings": METHOD_OPTIONS}


@with_options(run_options())
def prune(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **typed: Any,
) -> None:
    """Prune a model, measure its perplexity before and after, and save what you ask for.

    Example: coprune prune smollm2-135m --dataset embedded -p 2:4 --seqlen 512 --nsamples 32 --save-model out/pruned

    A method's own options (coprune methods lists them) are given like any other: --method sparsegpt --block-size 64
    """
    recipe = recipe_asked(context, typed)
    from coprune.base.processes import joined_processes
    from coprune.base.progress import Reporter
    from coprune.run.repeat import beside_finished
    from coprune.run.stages import run_recipe

    reporter = Reporter(quiet)
    with joined_processes() as processes:
        if typed["recipe"] is not None:
            asked = recipe
            named = {name for name in ("save", "save_model") if typed[name] is not None}
            recipe = processes.from_first(lambda: beside_finished(asked, named))
            if processes.first and recipe.run_folder != asked.run_folder:
                reporter.say(f"{asked.run_folder} holds a finished run; this one goes to {recipe.run_folder}.")
        report = run_recipe(recipe, reporter=reporter, processes=processes).report
    if processes.first:
        typer.echo(str(report))
        typer.echo(f"report    {recipe.run_folder / 'report.json'}")
        end_unless_held(report.required)
