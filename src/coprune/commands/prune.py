"""`coprune prune`: its options are the settings of a recipe, and the method's own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from coprune.commands.asked import METHOD_OPTIONS, recipe_asked, run_options
from coprune.commands.options import with_options
from coprune.commands.show import show
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
    from coprune.run.repeat import where_to
    from coprune.run.stages import run_recipe

    reporter = Reporter(quiet)
    with joined_processes(train=recipe.finetune.mode is not None) as processes:
        asked, named = recipe, {name for name in ("save", "save_model") if typed[name] is not None}
        recipe, said = processes.from_first(lambda: where_to(asked, typed["recipe"] is not None, named))
        if processes.first and said is not None:
            reporter.say(said)
        report = run_recipe(recipe, reporter=reporter, processes=processes).report
    if processes.first:
        show(str(report))
        show(f"report    {recipe.run_folder / 'report.json'}")
        show(f"page      {recipe.run_folder / 'report.html'}")
        end_unless_held(report.required)
