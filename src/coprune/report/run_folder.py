"""The folder of a run, and the model that its name stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.words import Command, Set, Words
from coprune.model.checkpoint.digest import source_digest
from coprune.model.checkpoint.glance import is_run
from coprune.model.checkpoint.locate import holds_model, locate
from coprune.recipe.recipe import Recipe
from coprune.report.card import write_card
from coprune.report.links import PAGE_FILE
from coprune.report.output_folder import OutputFolder
from coprune.report.schema import DISTRIBUTIONS_FILE, Report, reference_log

# Files of a run folder; a folder that holds one belongs to a run.
RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "report.json"
OWN_FOLDERS = ("trim", "remove", "prune", "train", "vocabulary")
"""Subfolders of a run: its steps, if there are several, and the trials of a vocabulary cut."""


def output_of(recipe: Recipe) -> OutputFolder:
    """Return the output folder of a recipe's run."""
    return OutputFolder(
        run=recipe.run_folder,
        model=recipe.output.model,
        source=recipe.model.name,
        report_file=REPORT_FILE,
        own=OWN_FOLDERS,
        files=(DISTRIBUTIONS_FILE, "log_*.txt"),
        mark=RECIPE_FILE,
        logs=(recipe.run_folder / "tensorboard", *([recipe.output.log_json] if recipe.output.log_json else [])),
        overwrite=bool(recipe.output.overwrite),
    )


def prepare_folders(recipe: Recipe, begun: bool = False) -> None:
    """Refuse to overwrite anything. Arguments and errors as for `OutputFolder.prepare`."""
    output_of(recipe).prepare(begun, lambda: _which(recipe))


def _which(recipe: Recipe) -> str:
    """Describe a run folder that has a report."""
    try:
        report = Report.read(recipe.run_folder / REPORT_FILE)
    except BadInput:
        return "a finished run"
    run = "a finished run" if report.recipe.has_same_result(recipe) else "another run"
    return run if has_source(report, recipe) else f"{run} on other weights"


def announce(recipe: Recipe, report: Report) -> None:
    """Save a report under its hidden name, in case the run is killed after its model is complete."""
    output_of(recipe).announce(report)


def announced(recipe: Recipe) -> Report | None:
    """Return the report of a finished run of this recipe that was killed before its last rename, or None."""
    blocks_left = any(recipe.run_folder.glob(".*.partial"))  # still needed by a streamed run that saves no model
    if blocks_left or (recipe.output.model is not None and not holds_model(recipe.output.model)):
        return None
    try:
        report = Report.read(output_of(recipe).announced)
    except BadInput:
        return None
    same = is_of(report, recipe) and report.saved_model == recipe.output.model
    return report if same else None


def is_of(report: Report, recipe: Recipe) -> bool:
    """Return whether a report is of this recipe and of the model that its name points to now."""
    return report.recipe.has_same_result(recipe) and has_source(report, recipe)


def has_source(report: Report, recipe: Recipe) -> bool:
    """Return whether the recipe's model still has the bytes that the report was made from, as far as this can be checked."""
    if report.model.digest is None:
        return True
    try:
        location = locate(recipe.model.name, recipe.model.cache_dir)
    except BadInput:
        return True  # gone or unreachable, so not replaced either
    return source_digest(location) == report.model.digest


def finish_run_folder(recipe: Recipe, report: Report) -> None:
    """Write the card, the log and the page of the announced report, and rename that last, since it marks the run as finished."""

    def write_beside(announced: Path) -> None:
        write_card(report)
        first = report.perplexity[0].pruned if report.perplexity else None
        log = reference_log(recipe.way, report.sparsity.matrices, first)
        write_text(recipe.run_folder / f"log_{recipe.way}.txt", log)
        write_page([announced], recipe.run_folder / PAGE_FILE)

    output_of(recipe).finish(write_beside)


def write_page(runs: Sequence[Path], path: Path) -> None:
    """Write the page of one or several runs. runs: folders, or report files. Raises BadInput if one has no report."""
    from coprune.report.runs_page import report_page

    for run in runs:
        _require_report(run)
    write_text(path, report_page(runs, path.parent))


def _require_report(run: Path) -> None:
    """Raise BadInput for a folder without a report, suggesting a run below it if there is one."""
    if not run.is_dir() or (run / REPORT_FILE).is_file():
        return
    below = (file.parent for depth in range(1, 4) for file in sorted(run.glob(f"{'*/' * depth}{REPORT_FILE}")))
    near = next(below, None)
    fix: Words = ("for example: ", Command("report", near)) if near else "name the folder of a finished run"
    raise BadInput(f"{run} holds no {REPORT_FILE}", field="runs", value=run, fix=fix)


def model_of(name: str) -> str:
    """Resolve a name to a model: the one saved by a run or a training, or the name itself.

    Raises BadInput for a run that saved no model, or whose model is gone.
    """
    folder = expand_home(name)
    if not is_run(folder):
        return name
    if not (folder / REPORT_FILE).is_file():
        return str(folder / "model")
    saved = Report.read(folder / REPORT_FILE).saved_model
    if saved is None:
        raise BadInput(
            f"the run {name} did not save its model",
            fix=("run it again with ", Set("save_model", ...), " to compare it"),
        )
    if not saved.exists():
        raise BadInput(f"the model of the run {name} is no longer at {saved}", fix="name its new folder")
    return str(saved)
