"""`coprune eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.environment import importing
from coprune.base.words import Command, Set, Words
from coprune.commands.options import MeasuringCommand, help_all_option, measuring_options, with_options
from coprune.commands.recipe_options import ModelArgument, ModelOption, look_at_texts, named_model
from coprune.commands.terminal import end_unless_held, show, show_next
from coprune.model.checkpoint.glance import writes_text
from coprune.recipe.views import measuring_recipe

READ_WITH = {"cls": MeasuringCommand}


@with_options([*measuring_options(), help_all_option()])
def evaluate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    against: Annotated[
        str | None, typer.Option(help="Also compare next-token distributions with this (dense) model.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all measurements to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **settings: Any,
) -> None:
    """Measure a model's perplexity on one or more texts, as the papers do (non-overlapping windows), or run tasks.

    For an image classifier: top-1 and top-5 accuracy on one or more image sets.

    Example: coprune eval smollm2-135m --data embedded --seqlen 512
    """
    from coprune.base.files import require_file, write_text

    require_file(json_file, "json")
    named = named_model(model, model_option, Command("evaluate", "smollm2-135m", Set("data", "embedded")))
    typed: Any = {name: value for name, value in settings.items() if value is not None}
    recipe = measuring_recipe(named, typed)
    if writes_text(named, recipe.model.cache_dir):
        look_at_texts(recipe, calibrates=False)
    with importing():
        from coprune.evaluation.evaluate_call import evaluate

    found = evaluate(named, against=against, quiet=quiet, **typed)
    if json_file is not None:
        write_text(json_file, found.model_dump_json(indent=2) + "\n")
    show(str(found))
    other: Words = ("compare it with a baseline: ", Command("compare", "BASELINE", named))
    show_next(other if against is None else ("put it all in a table: ", Command("compare", against, named)))
    end_unless_held(found.required)
