"""The folder of a run that names none, or of a repeated recipe: that of an interrupted run, or a new one."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from coprune.base.errors import BadInput
from coprune.base.files import folder_apart
from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.report.run_folder import RECIPE_FILE, REPORT_FILE


def where_to(recipe: Recipe, repeats: bool, named: Collection[str]) -> tuple[Recipe, str | None]:
    """Return the recipe with its output folders, and a message if they are not the default ones.

    Args:
        recipe: the requested recipe.
        repeats: whether it was read from a file, and so repeats a run.
        named: which of `save` and `save_model` were given explicitly, and stay as they are.
    """
    usual = recipe.run_folder
    if repeats and recipe.output.overwrite:
        return recipe, None
    if repeats:
        found = beside_finished(recipe, named)
        moved = found.run_folder != usual
        return found, f"{usual} holds a finished run; this one goes to {found.run_folder}." if moved else None
    if recipe.output.run is not None:
        return recipe, None
    folder, differing = folder_apart(usual, recipe.whole, partial(_settings_in, recipe))
    if not differing:
        return recipe, None
    said = f"{usual} holds a run that differs in {', '.join(differing)}; this one goes to {folder}."
    return recipe.replaced(save=folder), said


def _settings_in(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """Return the settings that determine the run in a folder.

    None if there is no run; empty if its recipe is of another version.
    """
    if not (folder / RECIPE_FILE).is_file():
        return None
    try:
        there = Recipe.from_yaml(folder / RECIPE_FILE).whole
    except BadInput:
        return {}
    if not (folder / REPORT_FILE).is_file():
        # An unfinished run resumes even if settings that affect rounding differ.
        there |= {name: value for name, value in recipe.deciding(Decides.ROUNDING).items() if name in there}
    return there


def beside_finished(recipe: Recipe, named: Collection[str] = ()) -> Recipe:
    """Return the recipe with numbered folders if its own hold a finished run: `out/run-2` for `out/run`, and so on.

    An interrupted run keeps its folder and resumes there.

    Args:
        recipe: the recipe of the file, with explicit settings applied.
        named: which of `save` and `save_model` were given explicitly, and stay as they are.
    """
    for number in count(1):
        run, model = recipe.run_folder, recipe.output.model
        if "save" not in named:
            run = _numbered(run, number)
            if (run / REPORT_FILE).is_file():
                continue
        if model is not None and "save_model" not in named:
            model = _numbered(model, number)
        goes_on = "save" not in named and run.exists()
        if goes_on or model is None or "save_model" in named or not _is_taken(model):
            moved = run != recipe.run_folder
            return recipe.replaced(save_model=model, **({"save": run} if moved else {}))
    raise AssertionError("numbers do not end")


def _numbered(folder: Path, number: int) -> Path:
    return folder if number == 1 else folder.with_name(f"{folder.name}-{number}")


def _is_taken(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
