"""What `overwrite` replaces: what a run left in its folder, and a model that coprune wrote. Nothing else is ever removed."""

from __future__ import annotations

import shutil

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.words import Setting
from coprune.model.edits import is_coprunes
from coprune.recipe.recipe import Recipe
from coprune.report.folder import REPORT_FILE
from coprune.report.links import PAGE_FILE
from coprune.report.schema import DISTRIBUTIONS_FILE

_FILES = (f".{REPORT_FILE}", PAGE_FILE, DISTRIBUTIONS_FILE, "search.json", "bench.json", "log_*.txt")
TUNED, CUT = ("pruned", "finetune"), ("cut", "zeros")
"""Folders of the two halves of a run that trains, and of one that cuts and prunes."""
_FOLDERS = TUNED + CUT + ("vocabulary", "rest")


def refuse_own_source(recipe: Recipe) -> None:
    """Raise BadInput where a run would remove the model that it reads."""
    source = expand_home(recipe.model.name)
    if not source.exists():
        return
    gone = [recipe.run_folder / name for name in _FOLDERS]
    gone += [recipe.output.model] if recipe.output.model is not None else []
    if any(source.resolve().is_relative_to(folder.resolve()) for folder in gone):
        fix = ("name other folders with ", Setting("save"), " and ", Setting("save_model"))
        raise BadInput(f"the run would replace {source}, which it reads", field="overwrite", value=True, fix=fix)


def replace_earlier(recipe: Recipe) -> None:
    """Remove what an earlier run left where this one writes. What an unfinished run left stays, to go on from."""
    run, model = recipe.run_folder, recipe.output.model
    finished = (run / REPORT_FILE).is_file()
    if finished:
        for pattern in _FILES:
            for file in run.glob(pattern):
                file.unlink()
        for name in _FOLDERS:
            shutil.rmtree(run / name, ignore_errors=True)
    if model is not None and is_coprunes(model):
        shutil.rmtree(model)
    if finished:
        (run / REPORT_FILE).unlink()  # last, since it says that the rest is of a finished run
