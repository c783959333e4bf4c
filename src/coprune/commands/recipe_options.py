"""The options shared by `prune` and `estimate`, and the recipe made from them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.errors import BadInput, about, unknown_name
from coprune.base.progress import Reporter
from coprune.base.words import Command, Set, say
from coprune.commands.options import help_all_option, method_options, recipe_options
from coprune.data.corpora import look_at_text
from coprune.evaluation.asked_texts import split_texts
from coprune.model.checkpoint.glance import look, writes_text
from coprune.recipe.choice import METHOD_NAMES, METHODS_OF_PACKAGES
from coprune.recipe.flat import PRESET, TRAIN, flatten, layered
from coprune.recipe.presets import BARE, usual_preset
from coprune.recipe.recipe import Recipe, make_recipe, read_settings
from coprune.recipe.sources import split_sources

METHOD_OPTIONS = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Typer settings that leave a method's own options to `recipe_asked`."""

ModelArgument = Annotated[
    str | None, typer.Argument(help="Hub id, local folder, GGUF file, or smollm2-135m.", show_default=False)
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The same, as an option.")]
_OWN: dict[str, Any] = {
    "model": ModelArgument,
    "model_option": ModelOption,
    "recipe": Annotated[Path | None, typer.Option("--recipe", help="Start from this recipe.yaml.")],
    "preset": Annotated[
        str | None,
        typer.Option(
            "--preset",
            help=f"Effort: fast, balanced or best. [{BARE}, if nothing says how to prune]",
            rich_help_panel="What is pruned, and how",
        ),
    ],
    "train": Annotated[
        str | None,
        typer.Option(
            "--train",
            help="What a preset trains: whole (the model) or blocks. [whole, if it fits the memory]",
            rich_help_panel="What is pruned, and how",
        ),
    ],
    "use_variant": Annotated[
        bool | None, typer.Option("--use-variant", help="Wanda's variant with an adaptive threshold.")
    ],
}


def run_options() -> list[inspect.Parameter]:
    """Return the options of a run: the sources of its settings, and every setting."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in _OWN.items()]
    return [*own, *recipe_options(BARE), help_all_option()]


def recipe_asked(context: typer.Context, typed: Mapping[str, Any], reporter: Reporter) -> Recipe:
    """Return the recipe made from a preset, a file and the command line; later ones win.

    Args:
        context: of the command, which holds the method's own options.
        typed: the values of `run_options`; None if not typed.
        reporter: told when a preset is used by default.

    Raises:
        BadInput: a preset, file, setting or option is unknown, no model is named, or the recipe is invalid.
    """
    settings = {name: value for name, value in typed.items() if value is not None and name not in _OWN}
    if model := one_model(typed["model"], typed["model_option"]):
        settings["model"] = model
    if typed["use_variant"]:
        settings["use_variant"] = True
    settings |= {name: typed[name] for name in (PRESET, TRAIN) if typed[name] is not None}
    if options := method_options(context.args, context.info_name or "prune"):
        settings["options"] = options
    from_file = read_settings(typed["recipe"]) if typed["recipe"] is not None else {}
    chosen: Mapping[str, Any] = layered(from_file, settings)
    if "model" not in flatten(chosen):
        raise _no_model(Command("prune", "smollm2-135m", Set("dataset", "embedded")))
    if typed["recipe"] is None:
        chosen, line = usual_preset(chosen)
        if line is not None:
            reporter.say(say(line))
    recipe = make_recipe(chosen)
    look_at(recipe)
    if PRESET not in flatten(chosen):
        return recipe
    from coprune.run.preset_training import recipe_that_fits  # imports torch, so after the first line

    return recipe_that_fits(chosen)


def run_as_typed(context: typer.Context, typed: Mapping[str, Any]) -> Command:
    """Return the pruning command with the options that were typed for another one.

    Args:
        context: of the command, which holds the method's own options.
        typed: the values of `run_options`; None if not typed.
    """
    model = one_model(typed["model"], typed["model_option"])
    first = [] if model is None else [Set("model", model) if model.startswith("-") else model]
    names = [name for name, value in typed.items() if value is not None and name not in ("model", "model_option")]
    return Command("prune", *first, *(Set(name, typed[name]) for name in names), *context.args)


def look_at(recipe: Recipe) -> None:
    """Raise BadInput for a missing model, text or method before the slow import of torch."""
    name = recipe.prune.method.name
    if "torch" not in sys.modules and name not in METHOD_NAMES and not entry_points(group=METHODS_OF_PACKAGES):
        raise unknown_name("method", name, METHOD_NAMES, field="method")
    look(recipe.model.name, recipe.model.cache_dir)
    if writes_text(recipe.model.name, recipe.model.cache_dir):
        look_at_texts(recipe)


def look_at_texts(recipe: Recipe, calibrates: bool = True) -> None:
    """Raise BadInput for a text that is missing or cannot be downloaded. calibrates: whether to check the calibration text."""
    where, asked = recipe.model.cache_dir, recipe.evaluate
    for source in split_sources(recipe.calibrate.data) if calibrates and recipe.reads_calibration else ():
        if not source.is_own:
            with about("dataset", recipe.calibrate.data):
                look_at_text(source.name, where)
    for text in split_texts(asked.data) if asked.perplexity else ():
        with about("eval_data", asked.data):
            look_at_text(text.name, where)


def named_model(model: str | None, model_option: str | None, example: Command) -> str:
    """Return the named model. Raises BadInput, with an example if none is named, and as `one_model` and `look`."""
    if found := one_model(model, model_option):
        look(found)
        return found
    raise _no_model(example)


def _no_model(example: Command) -> BadInput:
    return BadInput("no model is named", field="model", fix=("for example: ", example))


def one_model(model: str | None, model_option: str | None) -> str | None:
    """Return the model given as argument or as option. Raises BadInput if the two differ."""
    if model and model_option and model != model_option:
        raise BadInput(f"two models are named: {model} and {model_option}", field="model", value=model)
    return model or model_option
