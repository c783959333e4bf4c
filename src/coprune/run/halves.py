"""What is done as two runs, one on the other's model: parts removed and zeros, or a pruning and a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from coprune.base.progress import Reporter
from coprune.evaluation.extras import Extras
from coprune.model.checkpoint.load import load_model, load_processor
from coprune.model.checkpoint.locate import locate
from coprune.recipe.outcome import OutputPart
from coprune.recipe.recipe import Recipe
from coprune.report.folder import REPORT_FILE, announce, finish_run_folder
from coprune.report.hub import push, require_login
from coprune.report.schema import Report
from coprune.run.checks import CUT, TUNED, prepare_model_folder, refuse_own_source
from coprune.run.result import Result
from coprune.run.session import Given, Reuse, Surroundings

Run = Callable[[Recipe, Given, Surroundings, bool, Reuse | None], Result]


def run_halves(
    recipe: Recipe, given: Given, around: Surroundings, write: bool, run: Run, reuse: Reuse | None = None
) -> Result:
    """Do both halves of a run.

    Args:
        recipe: of both.
        given: what is taken instead of what the recipe names.
        around: who hears of it and who does it together.
        write: whether to leave a run folder.
        run: does what one half's recipe says.
        reuse: what the half that prunes or cuts the source takes over from other runs.

    Returns:
        What the second half made, and the report of both. Raises as both halves do.
    """
    own = recipe.replaced(overwrite=None)
    if around.processes.first and own.output.push_to_hub is not None:
        require_login(own.output.push_to_hub)
    if around.replaces is None:
        around = replace(around, replaces=around.processes.from_first(lambda: _replaced(recipe, own)))
    around = replace(around, whole=None if own.train.mode is None else own)
    turns = [around]  # the first half replaces what was there, once it has checked all it can

    def half(asked: Recipe, its: Given) -> Result:
        of_source = own.train.mode is not None or bool(asked.remove.parts)
        turn = turns.pop() if turns else replace(around, replaces=None)
        return run(asked, its, turn, write, reuse if of_source else None)

    return _tuned(own, given, around, half) if own.train.mode is not None else _cut(own, given, around, write, half)


def _replaced(recipe: Recipe, own: Recipe) -> Recipe | None:
    """The run that replaces what is there, if this one does; what both halves would refuse is refused before either."""
    trains = own.train.mode is not None
    first, second = TUNED if trains else CUT
    if recipe.output.overwrite:
        refuse_own_source(recipe)
    if recipe.output.overwrite or not (recipe.run_folder / second).exists():
        prepare_model_folder(recipe, (first,) if trains else (first, second))
    return recipe if recipe.output.overwrite and not (trains and _is_pruned(own)) else None


def _is_pruned(recipe: Recipe) -> bool:
    """Whether an unfinished run of this recipe has its first half, which is gone on from."""
    from coprune.training.after_pruning import pruning_of

    path = recipe.run_folder / REPORT_FILE
    return path.is_file() and Report.read(path).recipe.gives_as(pruning_of(recipe))


def _tuned(recipe: Recipe, given: Given, around: Surroundings, half: Callable[[Recipe, Given], Result]) -> Result:
    from coprune.training.after_pruning import prune_and_finetune

    output, processes = recipe.output, around.processes
    Extras.prepare(
        recipe, processes.size, given.loaded is None
    )  # what is asked of the trained model is checked before hours
    report = prune_and_finetune(
        recipe,
        lambda pruning: half(pruning, given).report,
        around.reporter,
        processes,
        in_memory=given.loaded is not None,
        anew=around.replaces is not None,
    )
    if report.saved_model is None:  # adapters that are not merged
        return Result(report)
    if processes.first:
        push_if_asked(output, around.reporter)
    where = locate(report.saved_model)
    return Result(report, load_processor(where, report.model.task), lambda: load_model(where, processed=False)[0])


def _cut(
    recipe: Recipe, given: Given, around: Surroundings, write: bool, half: Callable[[Recipe, Given], Result]
) -> Result:
    from coprune.run.to_removal import cut_and_prune

    anew = around.replaces is not None and (recipe.run_folder / REPORT_FILE).is_file()
    second, report = cut_and_prune(recipe, given, write, half, around.processes, anew)
    if around.processes.first:
        push_if_asked(recipe.output, around.reporter)
    return Result(report) if second is None else Result(report, second.processor, lambda: second.model)


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
