"""The parts of a run of several: a cut, zeros in what is left, a training; each goes from folder to folder.

So every part can be interrupted and goes on, and what it left stays to be compared with.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from coprune.base.errors import BadInput
from coprune.base.words import Setting
from coprune.evaluation.answers.questions import plan_of, questions_for
from coprune.model.checkpoint.load import load_model, load_processor
from coprune.model.checkpoint.locate import holds_model, locate
from coprune.model.checkpoint.weights import InMemory
from coprune.model.loaded_model import Loaded
from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.report.card import write_card
from coprune.report.folder import REPORT_FILE, announce, finish_run_folder, has_source, is_of
from coprune.report.hub import require_login
from coprune.report.schema import Report
from coprune.run.context import Given, Run
from coprune.run.result import Result
from coprune.run.reuse import Reuse
from coprune.steps.checks import CUT, TUNED, prepare_model_folder, refuse_finished, refuse_own_source
from coprune.steps.cut_and_prune import check_cut_and_zeros, cutting_of, of_both, zeros_of
from coprune.steps.train import check_training, pruning_of, train_pruned

Do = Callable[[Run], Result]
"""Does the stages of one part."""
Part = Callable[[Run, Result | None, Do], Result]
"""Does a part of a run, from what the part before it made."""


def check_parts(run: Run) -> None:
    """Check what no part would check before the parts before it have done their work. Raises BadInput."""
    recipe = run.recipe
    if run.first and recipe.output.push_to_hub is not None:
        require_login(recipe.output.push_to_hub)
    run.replaces = run.processes.from_first(lambda: _replaces(recipe))
    if recipe.train.mode is not None:
        run.processes.from_first(lambda: check_training(recipe, run.given.loaded is not None))
    if recipe.cuts_and_prunes:
        check_cut_and_zeros(recipe, run.given.method)


def _replaces(recipe: Recipe) -> bool:
    """Return whether a run replaces what is in its folders: not where an unfinished one is resumed."""
    trains, overwrites = recipe.train.mode is not None, bool(recipe.output.overwrite)
    first, second = TUNED if trains else CUT
    if overwrites:
        refuse_own_source(recipe)
    if overwrites or not (recipe.run_folder / second).exists():
        prepare_model_folder(recipe, (first,) if trains else (first, second))
    return overwrites and not (trains and _is_pruned(recipe))


def _is_pruned(recipe: Recipe) -> bool:
    path = recipe.run_folder / REPORT_FILE
    return path.is_file() and is_of(Report.read(path), _untrained(recipe))


def _untrained(recipe: Recipe) -> Recipe:
    """Return the recipe of what comes before the training; the whole one where nothing is trained."""
    recipe = recipe.replaced(overwrite=None)
    if recipe.train.mode is None:
        return recipe
    return pruning_of(recipe)


def check_answers(run: Run) -> None:
    """Raise BadInput where the model that is trained afterwards cannot be asked: its chat template fails, for one."""
    whole = (run.whole or run).recipe
    plan = plan_of(whole.evaluate.answers, saves=True) if whole.train.mode is not None else None
    if plan is not None and plan.is_asked and run.loaded.tokenizer is not None:
        questions_for(plan, run.loaded.tokenizer, run.loaded.model)


def pruned_before(run: Run) -> Result | None:
    """Return what an earlier run left that came as far as the training; None if none did. Raises BadInput for another run."""
    if run.recipe.train.mode is None:
        return None
    pruning = _untrained(run.recipe)

    def found() -> Report | None:
        path, model = pruning.run_folder / REPORT_FILE, pruning.output.model
        if run.replaces or not path.is_file() or model is None or not holds_model(model):
            return None
        report = Report.read(path)
        if not _goes_on(report, pruning):
            which = "a finished run" if is_of(report, run.recipe) else "another run"
            which += "" if has_source(report, pruning) else " on other weights"
            fix = ("name another folder with ", Setting("save"))
            raise BadInput(f"{pruning.run_folder} already holds {which}", field="save", fix=fix)
        return report

    report = run.processes.from_first(found)
    if report is None:
        return None
    run.reporter.say(f"Pruned by an earlier run: {pruning.output.model}")
    return Result(report)


def _goes_on(report: Report, recipe: Recipe) -> bool:
    """Return whether a finished part is one of this run, which may resume with other batches where memory ran out."""
    what = Decides.RESULT | Decides.MEASUREMENT
    return report.recipe.deciding(what) == recipe.deciding(what) and has_source(report, recipe)


def prune(run: Run, before: Result | None, do: Do) -> Result:
    """Prune, or cut, the source."""
    return _do_part(run, _untrained(run.recipe), run.given, do, run.reuse)


def cut(run: Run, before: Result | None, do: Do) -> Result:
    """Remove parts of the source."""
    recipe, folder = _untrained(run.recipe), _between(run)
    finished = run.processes.from_first((run.recipe.run_folder / REPORT_FILE).is_file)
    fresh = run.replaces and finished
    if run.write and not fresh:
        run.processes.from_first(lambda: refuse_finished(recipe.run_folder))
    cutting = cutting_of(recipe, folder)
    return _earlier(run, cutting, fresh) or _do_part(run, cutting, run.given, do, run.reuse)


def _between(run: Run) -> Path | None:
    """Return where the smaller model goes before it is pruned; None to leave it in memory."""
    recipe = _untrained(run.recipe)
    if run.write:
        return recipe.run_folder / CUT[0]
    target = recipe.output.model
    if run.given.loaded is not None or target is None or run.processes.size > 1:
        return None
    # A folder also holds tensors that the model's class does not load.
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(run.closing.enter_context(TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)))


def prune_rest(run: Run, before: Result | None, do: Do) -> Result:
    """Prune what a cut left."""
    assert before is not None
    recipe, removed, given = _untrained(run.recipe), before.report, Given(None, run.given.method)
    if removed.saved_model is None:
        if before.model is None:
            wrong = "cutting and pruning a streamed model needs a run folder for the intermediate model"
            raise BadInput(wrong, field="save", fix=("name one with ", Setting("save")))
        given = Given(Loaded(InMemory(before.model), before.processor, removed.model.source, False), run.given.method)
    own = zeros_of(recipe, removed, recipe.run_folder / CUT[1] if run.write else None)
    result = _earlier(run, own) or _do_part(run, own, given, do)
    report = of_both(recipe, removed, result.report)
    if run.first and recipe.output.model is not None:
        write_card(report, recipe.output.model)
    if run.writes:
        announce(recipe, report)
        finish_run_folder(recipe, report)
    return Result(report, result.processor, lambda: result.held)


def train(run: Run, before: Result | None, do: Do) -> Result:
    """Train what was pruned."""
    assert before is not None
    report = train_pruned(run.recipe.replaced(overwrite=None), before.report, run.reporter, run.processes)
    if report.saved_model is None:  # adapters that are not merged
        return Result(report)
    where = locate(report.saved_model)
    return Result(report, load_processor(where, report.model.task), lambda: load_model(where, processed=False)[0])


def _earlier(run: Run, recipe: Recipe, fresh: bool = False) -> Result | None:
    """Return a part that an earlier run did. fresh: whether all is done anew."""

    def found() -> Report | None:
        path, model = recipe.run_folder / REPORT_FILE, recipe.output.model
        if fresh or not run.write or not path.is_file() or (model is not None and not holds_model(model)):
            return None
        report = Report.read(path)
        if _goes_on(report, recipe):
            return report
        if not has_source(report, recipe) and recipe.run_folder != run.recipe.run_folder:
            run.reporter.say(
                f"{recipe.run_folder} was made of other weights than {recipe.model.name} has now: made again."
            )
            shutil.rmtree(recipe.run_folder)
        return None

    report = run.processes.from_first(found)
    return None if report is None else Result(report)


def _do_part(run: Run, recipe: Recipe, given: Given, do: Do, reuse: Reuse | None = None) -> Result:
    result = do(Run(recipe, given, run.reporter, run.processes, run.write, reuse or Reuse(), whole=run))
    # The others also wait here for the first one, which saves what all of them are about to read.
    report = run.processes.from_first(lambda: result.report)
    if report.saved_model is not None and run.recipe.train.mode is not None:
        return Result(report)  # nothing holds the model in memory while it is trained
    return Result(report, result.processor, lambda: result.held)
