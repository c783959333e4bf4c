"""Find the finished runs of a sweep: those whose folder has a report of the same recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.words import Command, Setting, duration, say
from coprune.recipe.flags import CommandLine
from coprune.recipe.recipe import Recipe
from coprune.report.links import SWEEP_FILE
from coprune.report.run_folder import REPORT_FILE, has_source
from coprune.report.schema import Report
from coprune.run.step import Left, source_named
from coprune.runner.runner import is_of_others
from coprune.sweeps.expand import Run, expand
from coprune.sweeps.file import SHARED_FOLDER, Sweep


def finished_report(recipe: Recipe) -> Report | None:
    """Return the report of a finished run, or None.

    Raises BadInput if the folder holds the report of another run, or an unreadable one.
    """
    folder = recipe.run_folder
    file = folder / REPORT_FILE
    if not file.is_file():
        return None
    try:
        report = Report.model_validate_json(file.read_text(encoding="utf-8"))
    except ValueError:
        raise BadInput(f"{file} cannot be read as a report", fix=f"remove {folder} to repeat that run") from None
    if not report.recipe.has_same_result(recipe):
        before, now = report.recipe.whole, recipe.whole
        differing = [f"{name} was {before[name]} and is {now[name]}" for name in now if before[name] != now[name]]
        raise BadInput(
            f"{folder} holds another run's report, in which {'; '.join(differing)}",
            field="save",
            value=folder,
            fix=("Name another folder with ", Setting("save"), ", or remove it"),
        )
    if not has_source(report, recipe):
        raise _other_weights(folder, recipe.model.name)
    return report


def _other_weights(folder: Path, model: str) -> BadInput:
    cause = f"{folder} holds a report for other weights: {model} has changed since"
    fix = ("Name another folder with ", Setting("save"), ", or remove it")
    return BadInput(cause, field="save", value=folder, fix=fix)


def finished_reports(runs: list[Run]) -> dict[str, Report]:
    """Return the reports of all finished runs by name, in the order of the runs."""
    found = {run.name: finished_report(run.recipe) for run in runs}
    for run in runs:
        if run.steps and found[run.name] is not None and is_of_others(run.steps, source_of(run)):
            raise _other_weights(run.recipe.run_folder, run.model)
    return {name: report for name, report in found.items() if report is not None}


def source_of(run: Run) -> Left:
    """Return the model that a run's steps start from. Raises BadInput if it does not exist."""
    return source_named(run.model, run.recipe.model.cache_dir)


def is_sweep(folder: Path) -> bool:
    """Return whether a folder holds a sweep."""
    return (folder / SWEEP_FILE).is_file()


def read_finished(folder: Path) -> tuple[Sweep, list[Run], dict[str, Report]]:
    """Read a sweep from its folder, even if that was moved: the sweep, its runs, and the reports of finished ones.

    Raises BadInput if no run is finished.
    """
    sweep = Sweep.read(folder / SWEEP_FILE).with_settings({"save": str(folder)})
    runs = expand(sweep)
    there = [run for run in runs if (folder / run.name / REPORT_FILE).is_file()]
    reports = {run.name: Report.read(folder / run.name / REPORT_FILE) for run in there}
    if not reports:
        raise BadInput(
            f"no run of the sweep in {folder} is finished",
            fix=("resume it with ", Command("sweep", folder / SWEEP_FILE)),
        )
    return sweep, runs, reports


def models_to_compare(name: str) -> list[str]:
    """Return the models that a name stands for: the dense and saved models of a sweep, otherwise the name itself.

    Raises BadInput if the runs of a sweep saved no models.
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
                " saves the models",
            ),
        )
    return [*dict.fromkeys(run.recipe.model.name for run in runs), *map(str, saved)]


_FILE = "ledger.json"
_NAMES = {
    "dense": "measuring the dense model",
    "statistics": "gathering statistics",
    "estimate": "estimating",
    "tokens": "tokenising",
}


class Ledger(BaseModel):
    """Record of a sweep's time."""

    wall: list[float] = []
    """Wall-clock seconds of each session, from the first job to the last."""
    saved: dict[str, dict[str, float]] = {}
    """Seconds saved by sharing, by run and kind of work."""
    runs: dict[str, float] = {}
    """Seconds of each run, including loading."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the ledger in a sweep's folder, or an empty one."""
        try:
            return cls.model_validate_json((folder / SHARED_FOLDER / _FILE).read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            return cls()

    def write(self, folder: Path) -> None:
        """Write the ledger to a sweep's folder, atomically."""
        write_text(folder / SHARED_FOLDER / _FILE, self.model_dump_json(indent=2) + "\n")

    def line(self) -> str:
        """Return a sentence or two on the time; empty before the first session."""
        if not self.wall:
            return ""
        sittings = "" if len(self.wall) == 1 else f" in {len(self.wall)} sessions"
        told = f"The sweep took {duration(sum(self.wall))}{sittings}; its runs together {duration(sum(self.runs.values()))}."
        kinds = {kind: sum(one.get(kind, 0.0) for one in self.saved.values()) for kind in _NAMES}
        parts = [f"{seconds:.0f} s of {_NAMES[kind]}" for kind, seconds in kinds.items() if seconds >= 0.5]
        return f"{told} Reused from other runs: {', '.join(parts)}." if parts else told


def sweep_command(folder: Path) -> str:
    """Return `coprune sweep …` for a sweep's folder, which resumes it, quoted for a shell."""
    return say(Command("sweep", folder / SWEEP_FILE), CommandLine())
