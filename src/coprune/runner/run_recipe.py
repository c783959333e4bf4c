"""Run a recipe, from plan to report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from coprune.base.files import write_text
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Reporter
from coprune.model.checkpoint.load import load_model, load_processor
from coprune.model.checkpoint.locate import locate
from coprune.recipe.recipe import Recipe
from coprune.report.hub_upload import push, require_login
from coprune.report.run_folder import (
    RECIPE_FILE,
    REPORT_FILE,
    announced,
    finish_run_folder,
    output_of,
    prepare_folders,
)
from coprune.report.schema import Report
from coprune.run.context import NOTHING, Given, Run
from coprune.run.result import Result
from coprune.run.reuse import Reuse
from coprune.runner.plan import Planned, plan_of, steps_of
from coprune.runner.runner import execute
from coprune.store.store import Store


def run_recipe(
    recipe: Recipe,
    given: Given = NOTHING,
    reporter: Reporter | None = None,
    write: bool = True,
    processes: Processes = ALONE,
    reuse: Reuse | None = None,
) -> Result:
    """Run a recipe.

    Args:
        recipe: the settings.
        given: objects that replace parts of the recipe, such as a loaded model.
        reporter: receives messages and events; by default on standard error.
        write: whether to write a run folder; training always does. The model is saved if the recipe names a folder for it.
        processes: the processes of the run; all of them call this.
        reuse: results shared with other runs; by default the dense model's figures, in the user's store.

    Returns:
        The report, with the model and its processor if they are in memory.

    Raises:
        BadInput, NumericalError, UnsupportedModel: as `prune`.
        LostProcess: another process ended.
    """
    heard = (reporter or Reporter()) if processes.first else Reporter(quiet=True)
    run = Run(recipe, given, heard, processes, write or recipe.train.mode is not None, reuse or Reuse(Store.of_user()))
    if processes.size == 1 and run.write and (report := announced(recipe)) is not None:
        finish_run_folder(recipe, report)  # for a run that was killed before this last action
        result = Result(report)
    else:
        with ExitStack() as closing:
            plan = plan_of(recipe, _between(run, closing))
            result = _run(run, plan, closing)
            if not run.write and plan[0].folder is not None and result.report.saved_model is None:
                _ = result.held  # before its folder is deleted
    _push(run, result.report)
    return result


def _between(run: Run, closing: ExitStack) -> Path | None:
    """Return the folder for models passed between steps; None to pass them in memory. closing: removes a temporary one."""
    recipe = run.recipe
    if run.write or len(steps_of(recipe)) == 1:
        return recipe.run_folder
    target = recipe.output.model
    in_memory = target is None or run.given.loaded is not None or run.processes.size > 1
    if in_memory and recipe.remove.vocabulary is None:
        return None
    # A folder also holds tensors that the model's class does not load.
    beside = None if target is None else target.parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    return Path(closing.enter_context(TemporaryDirectory(prefix=".coprune-", dir=beside)))


def _run(run: Run, plan: Sequence[Planned], closing: ExitStack) -> Result:
    recipe, several = run.recipe, len(plan) > 1
    if run.first and recipe.output.push_to_hub is not None:
        require_login(recipe.output.push_to_hub)
    folder = plan[-1].folder
    if run.first and (run.write or recipe.output.model):
        prepare_folders(recipe, begun=folder is not None and folder.exists())
    if run.first and run.write:
        closing.enter_context(output_of(recipe).claimed())
    replaces = bool(recipe.output.overwrite)
    anew = replaces and run.processes.from_first((recipe.run_folder / REPORT_FILE).is_file)
    steps = [planned.step.of(planned.recipe, planned.folder, run, several) for planned in plan]
    records, left = execute(steps, run.reporter, run.processes, partial(_taking, run), anew, replaces)
    if not several:
        assert left.held is not None
        return left.held
    report, *later = records
    assert isinstance(report, Report)
    for step, record in zip(steps[1:], later, strict=True):
        report = step.joined(recipe, report, record)
    run.conclude(report)
    if left.held is not None:
        held = left.held
        return Result(report, held.processor, lambda: held.held)
    if report.saved_model is None:
        return Result(report)
    where = locate(report.saved_model)
    return Result(report, load_processor(where, report.model.task), lambda: load_model(where, processed=False)[0])


@contextmanager
def _taking(run: Run) -> Iterator[None]:
    """Claim a run's folders, replace an earlier run if requested, and write the recipe."""
    recipe = run.recipe
    if recipe.output.overwrite:
        output_of(recipe).replace_earlier()
    yield
    if run.write:
        write_text(recipe.run_folder / RECIPE_FILE, recipe.as_stored().to_yaml())


def _push(run: Run, report: Report) -> None:
    """Upload the saved model to the Hub, if the recipe says so. Raises as `report.hub_upload.push`."""
    asked = run.recipe.output
    if run.first and asked.push_to_hub is not None and asked.model is not None and report.saved_model is not None:
        run.reporter.say(f"Pushed to {push(asked.model, asked.push_to_hub, bool(asked.private))}")
