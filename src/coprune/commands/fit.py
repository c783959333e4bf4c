"""`coprune fit`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.environment import expand_home, importing
from coprune.base.validation import settings_of
from coprune.base.words import Command, Words
from coprune.commands.options import ShortCommand, help_all_option, settings_options, with_options
from coprune.commands.terminal import show, show_next
from coprune.fitting.fit_settings import FitSettings
from coprune.fitting.looking import look_at_settings, require_own_folder
from coprune.model.checkpoint.glance import is_run, look

NOT_KEPT = 1
READ_WITH = {"cls": ShortCommand}


@with_options([*settings_options(FitSettings), help_all_option()])
def fit(
    model: Annotated[str, typer.Argument(help="A model to fit, or the recipe.yaml of an earlier fit to repeat.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model, its recipe, page and card.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SHARE]",
            help="Items of one kind, repeatable: .jsonl or .csv of {prompt, choices, answer}, {prompt, answer}, {prompt, regex}, "
            "{prompt} or {text}, plain text, or a task of lm-eval (its name, or its definition in .yaml). Half of them are never "
            "seen by the search. SHARE: of the calibration text.",
            show_default=False,
        ),
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(
            help="Conditions to meet, comma-separated: accuracy>=dense-0.01, bits<=dense*1.02, acceptance>=0.9, kl<=0.1. "
            "[by the kind of task: accuracy>=dense-0.02, bits<=dense*1.02, acceptance>=0.9]",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **settings: Any,
) -> None:
    """Find the smallest file of a model that still does your tasks, and prove it on items that the search never saw.

    Tries plain quants with an importance matrix, a type for each tensor, smaller embeddings, and fewer tokens, experts,
    channels or blocks with distillation.

    Exit code 0: requirement met on the unseen half; 1: not met. Run the same command again to resume.

    Example: coprune fit smollm2-135m --task examples/fit/choice.jsonl --require 'accuracy>=dense-0.25' -o small
    """
    began = time.monotonic()  # the budget counts from here
    from coprune.base.errors import BadInput
    from coprune.fitting.require import wanted
    from coprune.fitting.tasks import is_file

    how: Any = {name: value for name, value in settings.items() if value is not None}
    asked = settings_of(FitSettings, how)
    look_at_settings(asked)
    is_recipe = Path(model).suffix in (".yaml", ".yml")
    if not is_recipe:
        require_own_folder(expand_home(output))
        if task and all(is_file(one) for one in task):
            wanted(task, require, asked.seed, asked.items)
        if not is_run(expand_home(model)):
            look(model)
    with importing():
        from coprune.fitting.fit_call import Request, remake, run_fit

    if is_recipe:
        made = remake(model, output, quiet, asked.converter)
        show(f"{made}: byte for byte as the recipe says")
        show_next(_measure(made))
        return
    if not task:
        raise BadInput("no task is named", field="task", fix="name a file of items, as in examples/fit/choice.jsonl")
    found = run_fit(Request(model, task, require, output, how), quiet, began)
    show(str(found))
    if not found.kept:
        raise typer.Exit(NOT_KEPT)
    if not found.next:
        show_next(_measure(found.file))


def _measure(file: Path) -> Words:
    return ("measure its speed here: ", Command("bench", file))
