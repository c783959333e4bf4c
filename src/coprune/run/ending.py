"""How a run ends, once its model is saved: its report, its page, and whoever else gets the model."""

from __future__ import annotations

import time

from coprune.base.progress import Reporter
from coprune.recipe.outcome import OutputPart
from coprune.recipe.recipe import Recipe
from coprune.report.folder import announce, finish_run_folder
from coprune.report.hub import push
from coprune.report.schema import Report
from coprune.run.session import Surroundings


def finished(recipe: Recipe, report: Report, started: float, around: Surroundings) -> Report:
    """The report with all that the run took but for its page, which is made if the run leaves a folder."""
    report = report.model_copy(update={"total_seconds": time.perf_counter() - started})
    if around.writes:
        announce(recipe, report)
        finish_run_folder(recipe, report)
    return report


def push_if_asked(output: OutputPart, reporter: Reporter) -> None:
    """Put the saved model on the Hub, where a recipe says so. Raises as `push`."""
    if output.push_to_hub is not None and output.model is not None:
        reporter.say(f"Pushed to {push(output.model, output.push_to_hub, bool(output.private))}")
