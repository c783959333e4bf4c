"""`coprune prune` and `coprune estimate`, which take the same options: those of a recipe, and the method's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.errors import BadInput
from coprune.commands.options import method_options, recipe_options, with_options
from coprune.recipe.flat import flatten, layered
from coprune.recipe.presets import preset_settings
from coprune.recipe.recipe import Recipe, make_recipe, read_settings

METHOD_OPTIONS = {"ignore_unknown_options": True, "allow_extra_args": True}

_Model = Annotated[
    str | None, typer.Argument(help="Hub id, local folder, GGUF file, or smollm2-135m.", show_default=False)
]
_ModelOption = Annotated[str | None, typer.Option("--model", help="The same, as an option.")]
_RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="Start from this recipe.yaml.")]
_Preset = Annotated[str | None, typer.Option("--preset", help="fast, balanced or best: settings that belong together.")]
_UseVariant = Annotated[
    bool, typer.Option("--use-variant", "--use_variant", help="Wanda's variant with an adaptive threshold.")
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")]


@with_options(recipe_options())
def prune(
    context: typer.Context,
    model: _Model = None,
    model_option: _ModelOption = None,
    recipe: _RecipeFile = None,
    preset: _Preset = None,
    use_variant: _UseVariant = False,
    quiet: _Quiet = False,
    **settings: Any,
) -> None:
    """Prune a model, measure its perplexity before and after, and save what you ask for.

    Example: coprune prune smollm2-135m --dataset embedded -p 2:4 --seqlen 512 --nsamples 32 --save-model out/pruned

    A method's own options (coprune methods lists them) are given like any other: --method sparsegpt --block-size 64
    """
    checked = _recipe_typed(context, _one_model(model, model_option), recipe, preset, use_variant, settings)
    from coprune.base.processes import joined_processes
    from coprune.base.progress import Reporter
    from coprune.report.summary import summary_lines
    from coprune.run.repeat import beside_finished
    from coprune.run.stages import run_recipe

    reporter = Reporter(quiet)
    with joined_processes() as processes:
        if recipe is not None:
            asked = checked
            named = {name for name in ("save", "save_model") if settings[name] is not None}
            checked = processes.from_first(lambda: beside_finished(asked, named))
            if processes.first and checked.run_folder != asked.run_folder:
                reporter.say(f"{asked.run_folder} holds a finished run; this one goes to {checked.run_folder}.")
        report = run_recipe(checked, reporter=reporter, processes=processes).report
    if processes.first:
        typer.echo("\n".join(summary_lines(report)))
        typer.echo(f"report    {checked.run_folder / 'report.json'}")


@with_options(recipe_options())
def estimate(
    context: typer.Context,
    model: _Model = None,
    model_option: _ModelOption = None,
    recipe: _RecipeFile = None,
    preset: _Preset = None,
    use_variant: _UseVariant = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    quiet: _Quiet = False,
    **settings: Any,
) -> None:
    """Tell how much memory and time `coprune prune` would take here with the same options, without doing it."""
    checked = _recipe_typed(context, _one_model(model, model_option), recipe, preset, use_variant, settings)
    from coprune.base.progress import Reporter
    from coprune.run.stages import estimate_recipe

    found = estimate_recipe(checked, Reporter(quiet))
    typer.echo(found.to_json() if as_json else found.line())
    if not found.fits and not as_json:
        typer.echo(f"It would not fit. {found.proposal}")


def _one_model(model: str | None, model_option: str | None) -> str | None:
    if model and model_option and model != model_option:
        raise BadInput(f"two models are named: {model} and {model_option}.")
    return model or model_option


def _recipe_typed(
    context: typer.Context,
    model: str | None,
    recipe: Path | None,
    preset: str | None,
    use_variant: bool,
    settings: dict[str, Any],
) -> Recipe:
    """The recipe that a preset, a file and what was typed make together; what comes later wins."""
    typed = {name: value for name, value in settings.items() if value is not None}
    typed |= {"model": model} if model else {}
    typed |= {"use_variant": True} if use_variant else {}
    if options := method_options(context.args):
        typed["options"] = options
    from_preset = preset_settings(preset) if preset is not None else {}
    from_file = read_settings(recipe) if recipe is not None else {}
    chosen = layered(from_preset, from_file, typed)
    if "model" not in flatten(chosen):
        raise BadInput("no model is named; for example: coprune prune smollm2-135m --dataset embedded.")
    return make_recipe(chosen)
