"""Which runs of a sweep are done: those whose folder holds the report of the very same recipe."""

from __future__ import annotations

from pathlib import Path

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.words import Command, Setting
from coprune.recipe.recipe import Recipe
from coprune.report.folder import REPORT_FILE
from coprune.report.links import SWEEP_FILE
from coprune.report.schema import Report
from coprune.run.sweep.expand import Run, expand
from coprune.run.sweep.file import Sweep


def finished_report(recipe: Recipe) -> Report | None:
    """The report that a finished run left; None if it has not ended.

    Raises BadInput if the folder holds the report of another run, or one that cannot be read.
    """
    folder = recipe.run_folder
    file = folder / REPORT_FILE
    if not file.is_file():
        return None
    try:
        report = Report.model_validate_json(file.read_text(encoding="utf-8"))
    except ValueError:
        raise BadInput(f"{file} cannot be read as a report", fix=f"remove {folder} to do that run again") from None
    trains = _is_to_train(recipe, report)
    expected = _pruning_of(recipe) if trains else recipe
    if not report.recipe.gives_as(expected):
        before, now = report.recipe.whole, expected.whole
        differing = [f"{name} was {before[name]} and is {now[name]}" for name in now if before[name] != now[name]]
        raise BadInput(
            f"{folder} holds another run's report, in which {'; '.join(differing)}",
            field="save",
            value=folder,
            fix=("Name another folder with ", Setting("save"), ", or remove it"),
        )
    return None if trains else report


def finished_reports(runs: list[Run]) -> dict[str, Report]:
    """The reports of all finished runs by name, in the order of the runs."""
    found = {run.name: finished_report(run.recipe) for run in runs}
    return {name: report for name, report in found.items() if report is not None}


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / SWEEP_FILE).is_file()


def read_finished(folder: Path) -> tuple[Sweep, list[Run], dict[str, Report]]:
    """A sweep from its folder, wherever that lies now: its runs and the reports of those that are finished.

    Raises BadInput if none is.
    """
    sweep = Sweep.read(folder / SWEEP_FILE).with_settings({"save": str(folder)})
    runs = expand(sweep)
    there = [run for run in runs if (folder / run.name / REPORT_FILE).is_file()]
    found = {run.name: Report.read(folder / run.name / REPORT_FILE) for run in there}
    reports = {run.name: found[run.name] for run in there if not _is_to_train(run.recipe, found[run.name])}
    if not reports:
        raise BadInput(
            f"no run of the sweep in {folder} is finished", fix=(Command("sweep", folder / SWEEP_FILE), " goes on")
        )
    return sweep, runs, reports


def models_to_compare(name: str) -> list[str]:
    """The models that a name stands for: of a sweep its dense models and what its runs saved; else the name itself.

    Raises BadInput for a sweep whose runs saved no models.
    """
    folder = expand_home(name)
    if not is_sweep(folder):
        return [name]
    _, runs, reports = read_finished(folder)
    saved = [folder / run for run, report in reports.items() if report.saved_model is not None]
    if not saved:
        raise BadInput(
            f"the runs of the sweep in {name} saved no models",
            fix=(
                f"its tables are in {folder / 'results.md'}, and a sweep with ",
                Setting("save_model"),
                " keeps the models",
            ),
        )
    return [*dict.fromkeys(run.recipe.model.name for run in runs), *map(str, saved)]


def _is_to_train(recipe: Recipe, report: Report) -> bool:
    """Whether a run that trains has not done so yet: its report is the pruning's."""
    return recipe.finetune.mode is not None and report.finetuned is None


def _pruning_of(recipe: Recipe) -> Recipe:
    """The recipe of the half that prunes."""
    from coprune.training.after_pruning import pruning_of

    return pruning_of(recipe)
