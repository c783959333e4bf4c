"""`coprune inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coprune.base.words import Command, Set, Words
from coprune.commands.options import inspecting_options, with_options
from coprune.commands.recipe_options import ModelArgument, ModelOption, named_model
from coprune.commands.terminal import show, show_next
from coprune.model.checkpoint.glance import PACKAGED
from coprune.recipe.recipe import make_recipe

_FEW_SAMPLES = 16
_USUAL = ("experts=0.25", "channels=0.25")
"""Removals to propose first, if the model has such parts."""


@with_options(inspecting_options())
def inspect(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    matrices: Annotated[bool, typer.Option("--matrices", help="One line per matrix instead of one per kind.")] = False,
    weights: Annotated[bool, typer.Option(help="Read the weights, to report their sparsity.")] = True,
    plot: Annotated[
        str | None,
        typer.Option(help="Plot this matrix: weight magnitudes, input norms, Wanda scores (takes a pass over data)."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plot, .png or .svg.")] = Path("matrix.svg"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
    **settings: Any,
) -> None:
    """Show a model's blocks and matrices, what would be pruned, what could go, and the current sparsity."""
    typed = {name: value for name, value in settings.items() if value is not None}
    named = named_model(model, model_option, Command("inspect", "smollm2-135m", Set("pattern", "2:4")))
    recipe = make_recipe({"model": named, "nsamples": _FEW_SAMPLES} | typed)
    from coprune.base.progress import Reporter
    from coprune.steps.inspect import inspect_recipe

    said = (Set(name, value) for name, value in typed.items())
    prune_it: Words = ("prune it: ", Command("prune", named, *said, Set("save_model", ...)))
    if plot is None:
        found = inspect_recipe(recipe, Reporter(quiet), weights)
        show("\n".join(found.lines(matrices)))
        if typed or not found.removable:
            show_next(prune_it)
        else:  # zeros alone make nothing smaller
            part = next(one for one in (*_USUAL, *found.removable) if one in found.removable)
            text = [Set("dataset", "embedded")] if named in PACKAGED else []  # whose user may have no network
            asked = Command("prune", named, Set("remove", part), *text, Set("dry_run", True))
            show_next(("what a removal takes: ", asked))
        return
    from coprune.stages.plot_matrix import plot_matrix

    plot_matrix(recipe, plot, output, Reporter(quiet))
    show(f"plot      {output}")
    show_next(prune_it)
