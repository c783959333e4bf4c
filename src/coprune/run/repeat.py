"""A run repeated from its recipe: it goes on where it was interrupted, or beside what is finished, never over it."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from pathlib import Path

from coprune.recipe.recipe import Recipe
from coprune.report.folder import REPORT_FILE


def beside_finished(recipe: Recipe, named: Collection[str] = ()) -> Recipe:
    """The recipe with other folders where its own hold a finished run: `out/run-2` for `out/run`, and so on.

    A run that was interrupted keeps its folder and goes on there.

    Args:
        recipe: as its file says, with what was asked for on top.
        named: which of `save` and `save_model` were asked for now, and stay as they are.
    """
    for number in count(1):
        run, model = recipe.run_folder, recipe.output.model
        if "save" not in named:
            run = _numbered(run, number)
            if _is_finished(run, recipe):
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


def _is_finished(run: Path, recipe: Recipe) -> bool:
    tuned = recipe.finetune.mode is None or (run / "finetune" / "finetune.json").is_file()
    return (run / REPORT_FILE).is_file() and tuned


def _is_taken(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
