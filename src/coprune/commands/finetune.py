"""`coprune finetune`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from coprune.base.environment import importing, rank
from coprune.base.progress import Reporter
from coprune.base.words import Command, Set
from coprune.commands.closing import closing_of_training
from coprune.commands.options import TrainingCommand, help_all_option, training_options, with_options
from coprune.commands.recipe_options import ModelOption, named_model
from coprune.commands.terminal import end_unless_held, show
from coprune.commands.times import Times
from coprune.recipe.views import training_recipe
from coprune.training.training_events import TrainingPhase

READ_WITH = {"cls": TrainingCommand}


@with_options([*training_options(), help_all_option()])
def finetune(
    model: Annotated[
        str | None, typer.Argument(help="The pruned model: a local folder or Hub id.", show_default=False)
    ] = None,
    model_option: ModelOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **settings: Any,
) -> None:
    """Recover accuracy lost to pruning, keeping every zero: masked LoRA, masked dense training, or distillation.

    Example: coprune finetune out/pruned --mode lora --dataset embedded --seqlen 512 --minutes 20
    """
    began = time.monotonic()  # a time limit counts from here
    times = Times(began)
    typed = {name: value for name, value in settings.items() if value is not None}
    named = named_model(model, model_option, Command("finetune", "FOLDER", Set("dataset", "embedded")))
    recipe = training_recipe({"model": named} | typed)  # errors are reported before torch is loaded
    with importing():
        from coprune.training.finetuning import run_finetuning

    times.started()
    reporter = Reporter(quiet)
    reporter.listeners.append(times.hear)
    report = run_finetuning(recipe, reporter, began=began)
    if rank() == 0:
        show(str(report))
        show(f"time      {times.line({TrainingPhase.TRAIN: report.seconds})}")
        show(f"curves    {report.settings.training_folder / 'finetune.json'}")
        show(f"page      {report.settings.training_folder / 'report.html'}")
        for name, line in closing_of_training(report):
            show(f"{name:<9} {line}")
        end_unless_held(report.required)
