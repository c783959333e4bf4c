"""`coprune prune`; its options are the settings of a recipe and of the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coprune.base.environment import importing, rank
from coprune.base.progress import Reporter
from coprune.base.words import Command, Set, Words, say
from coprune.commands.closing import verdict_on
from coprune.commands.options import ShortCommand, with_options
from coprune.commands.recipe_options import METHOD_OPTIONS, recipe_asked, run_as_typed, run_options
from coprune.commands.terminal import end_unless_held, show, show_next
from coprune.commands.times import Times, of_any_process

if TYPE_CHECKING:
    from coprune.recipe.recipe import Recipe
    from coprune.report.schema import Report

READ_WITH = {"context_settings": METHOD_OPTIONS, "cls": ShortCommand}


@with_options(run_options())
def prune(
    context: typer.Context,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only print the steps with their memory, time and bytes; read no weights and write nothing.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **typed: Any,
) -> None:
    """Prune a model, measure its perplexity before and after, and save what you ask for.

    Example: coprune prune smollm2-135m --dataset embedded -p 2:4 --seqlen 512 --save-model small

    Options of a method (see coprune methods) are given the same way: -m sparsegpt --block-size 64
    """
    times, reporter = Times(context.obj), Reporter(quiet or rank() != 0)
    recipe = recipe_asked(context, typed, reporter)
    if rank() == 0:  # before torch and transformers are imported, which takes seconds
        reporter.say(f"{recipe.model.name}: {recipe.way}, {recipe.shape}")
    if dry_run:
        _tell(recipe, context, typed, reporter)
        return
    with importing():
        from coprune.base.processes import joined_processes
        from coprune.runner.repeat import where_to
        from coprune.runner.run_recipe import run_recipe
    times.started()
    reporter.listeners.append(times.hear)
    with joined_processes(train=recipe.train.mode is not None) as processes:
        asked, named = recipe, {name for name in ("save", "save_model") if typed[name] is not None}
        recipe, said = processes.from_first(lambda: where_to(asked, typed["recipe"] is not None, named))
        if processes.first and said is not None:
            reporter.say(said)
        report = run_recipe(recipe, reporter=reporter, processes=processes).report
    if processes.first:
        show(str(report))
        show(f"time      {times.line(of_any_process(report))}")
        show(f"report    {recipe.run_folder / 'report.json'}")
        show(f"page      {recipe.run_folder / 'report.html'}")
        for name, line in closing(report):
            show(f"{name:<9} {line}")
        end_unless_held(report.required)


def _tell(recipe: Recipe, context: typer.Context, typed: Mapping[str, Any], reporter: Reporter) -> None:
    """Print what a run would do."""
    with importing():
        from coprune.runner.dry_run import dry_run
        from coprune.runner.repeat import where_to
    named = {name for name in ("save", "save_model") if typed[name] is not None}
    show(str(dry_run(where_to(recipe, typed["recipe"] is not None, named)[0], reporter)))
    show_next(("run it: ", run_as_typed(context, typed)))


def closing(report: Report) -> list[tuple[str, str]]:
    """Return the last lines of a run: a verdict on the model's text, and what to type next."""
    answers, lines = report.answers, []
    if answers is not None:
        lines.append(("verdict", verdict_on(answers)))
    return [*lines, ("next", say(_next_step(report)))]


def _next_step(report: Report) -> Words:
    recipe, saved = report.recipe, report.saved_model
    if saved is None:
        return ("to keep the model, run the same again with ", Set("save_model", ...), " ", Set("overwrite", True))
    if report.answers is None or not report.answers.degenerates:
        if report.model.task == "text" and not recipe.output.as_gguf:
            return ("for llama.cpp and Ollama: ", Command("export", saved, f"{saved.name}.gguf", Set("type", "q8_0")))
        return ("measure its speed here: ", Command("bench", saved))
    if recipe.train.mode is not None:
        return ("prune less, or train longer with ", Set("finetune_minutes", ...))
    dense = Set("teacher", recipe.model.name)
    train = Command(
        "finetune", saved, Set("mode", "distill"), dense, Set("dataset", recipe.calibrate.data), Set("minutes", 10)
    )
    if recipe.remove.parts or recipe.prune.reconstruct.steps:
        return ("train it toward the dense model: ", train)
    return ("recover more while pruning with ", Set("preset", "balanced"), ", or train the result: ", train)
