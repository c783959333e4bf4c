"""A recipe from plan to report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from coprune.base.errors import BadInput
from coprune.base.files import digest_of_files, write_text
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Reporter
from coprune.base.words import Setting
from coprune.data.local_text import split_column
from coprune.evaluation.asked_texts import split_texts
from coprune.model.checkpoint.load import load_model, load_processor
from coprune.model.checkpoint.locate import holds_model, locate
from coprune.model.checkpoint.weights import InMemory
from coprune.model.checkpoint.writer import discard_unfinished
from coprune.model.edits import is_coprunes
from coprune.model.loaded_model import Loaded
from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import split_sources
from coprune.recipe.vocabulary import shares_of
from coprune.report.card import write_card
from coprune.report.folder import RECIPE_FILE, REPORT_FILE, announce, announced, finish_run_folder
from coprune.report.hub import push, require_login
from coprune.report.schema import Report
from coprune.run.context import NOTHING, Given, Run
from coprune.run.result import Result
from coprune.run.reuse import Reuse
from coprune.runner.joined import joined
from coprune.runner.plan import Name, Planned, plan_of, steps_of
from coprune.runner.runner import Left, Step, Taking, go
from coprune.stages.checks import check_zeros_after, prepare_folders, replace_earlier
from coprune.stages.to_gguf import refuse_other_changes
from coprune.steps.prune import prune
from coprune.steps.remove import remove
from coprune.steps.train import check_training, finished_training, train
from coprune.steps.trim import check_trim, trim
from coprune.store.store import Store
from coprune.training.report import FinetuneReport

_DO: dict[Name, Callable[[Run], Result]] = {"trim": trim, "remove": remove, "prune": prune}


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
        write: whether to write a run folder (the model is saved if the recipe names a folder for it). A training writes one.
        processes: this one among those of the run, which all call this.
        reuse: results shared with other runs; by default the dense model's figures, in the user's store.

    Returns:
        The report, with the model and its processor as far as they are in memory.

    Raises:
        BadInput, NumericalError, UnsupportedModel: as `prune`.
        LostProcess: another process ended.
    """
    heard = (reporter or Reporter()) if processes.first else Reporter(quiet=True)
    run = Run(recipe, given, heard, processes, write or recipe.train.mode is not None, reuse or Reuse(Store.of_user()))
    if processes.size == 1 and run.write and (report := announced(recipe)) is not None:
        finish_run_folder(recipe, report)  # a run that was killed when only this was left
        result = Result(report)
    else:
        with ExitStack() as closing:
            plan = plan_of(recipe, _between(run, closing))
            result = _run(run, plan)
            if not run.write and plan[0].folder is not None and result.report.saved_model is None:
                _ = result.held  # while the folder that it may be read from is there
    _push(run, result.report)
    return result


def _between(run: Run, closing: ExitStack) -> Path | None:
    """Return the folder of what steps leave to the next; None to leave it in memory. closing: removes a temporary one."""
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


def _run(run: Run, plan: Sequence[Planned]) -> Result:
    recipe, several = run.recipe, len(plan) > 1
    if run.first and recipe.output.push_to_hub is not None:
        require_login(recipe.output.push_to_hub)
    folder = plan[-1].folder
    if run.first and (run.write or recipe.output.model):
        prepare_folders(recipe, begun=folder is not None and folder.exists())
    replaces = bool(recipe.output.overwrite)
    anew = replaces and run.processes.from_first((recipe.run_folder / REPORT_FILE).is_file)
    steps = [StepOfRecipe.of(planned, run, several) for planned in plan]
    records, left = go(steps, run.reporter, run.processes, partial(_taking, run), anew, replaces)
    if not several:
        assert left.held is not None
        return left.held
    report, *later = records
    assert isinstance(report, Report)
    for record in later:
        assert isinstance(record, Report | FinetuneReport)
        report = joined(recipe, report, record)
    if run.first and report.saved_model is not None:
        write_card(report, report.saved_model)
    if run.writes:
        announce(recipe, report)
        finish_run_folder(recipe, report)
    if left.held is not None:
        held = left.held
        return Result(report, held.processor, lambda: held.held)
    if report.saved_model is None:
        return Result(report)
    where = locate(report.saved_model)
    return Result(report, load_processor(where, report.model.task), lambda: load_model(where, processed=False)[0])


@contextmanager
def _taking(run: Run) -> Iterator[None]:
    """Take a run's folders: what an earlier run left goes where that is asked for, and the recipe is kept."""
    recipe = run.recipe
    if recipe.output.overwrite:
        replace_earlier(recipe)
    yield
    if run.write:
        write_text(recipe.run_folder / RECIPE_FILE, recipe.untold().to_yaml())


def _push(run: Run, report: Report) -> None:
    """Upload the saved model to the Hub, if the recipe says so. Raises as `report.hub.push`."""
    asked = run.recipe.output
    if run.first and asked.push_to_hub is not None and asked.model is not None and report.saved_model is not None:
        run.reporter.say(f"Pushed to {push(asked.model, asked.push_to_hub, bool(asked.private))}")


def _files_read(recipe: Recipe) -> str:
    """Return the digest of the files beside its model that decide what a recipe makes."""
    names = [source.prompts or source.name for source in split_sources(recipe.calibrate.data)]
    names += [*recipe.remove.texts.values(), *shares_of(recipe.remove.vocabulary_text, "vocabulary_text")]
    names += [] if recipe.remove.kept_scores is None else [str(recipe.remove.kept_scores)]
    names += [recipe.prune.allocation.name] if recipe.prune.allocation.is_file else []
    return _digest_of(names)


def _digest_of(names: Sequence[str]) -> str:
    """Return the digest of those files that there are."""
    return digest_of_files((path for name in names if (path := split_column(name)[0]).is_file()), named=False)


@dataclass(frozen=True, kw_only=True)
class StepOfRecipe(Step):
    """A planned step of a run, for the runner."""

    planned: Planned
    whole: Run
    is_one_of_several: bool

    @classmethod
    def of(cls, planned: Planned, run: Run, is_one_of_several: bool) -> Self:
        """Return a step with the settings of its own that decide its result, and what is measured of it."""
        recipe = planned.recipe
        texts = _digest_of([text.name for text in split_texts(recipe.evaluate.data)])
        return cls(
            name=planned.name,
            folder=planned.folder if run.write else None,
            settings={name: value for name, value in recipe.deciding(Decides.RESULT).items() if name != "model"},
            measured=recipe.deciding(Decides.MEASUREMENT) | {"texts to measure on": texts},
            planned=planned,
            whole=run,
            is_one_of_several=is_one_of_several,
        )

    def check(self) -> None:
        """Check what would else come late. Raises BadInput."""
        recipe, given = self.whole.recipe, self.whole.given
        if self.name == "trim":
            check_trim(recipe, self.whole.processes.size)
        elif self.name == "train":
            check_training(recipe, given.loaded)
        elif recipe.output.as_gguf:
            refuse_other_changes(recipe, given)
        elif self.is_one_of_several:
            check_zeros_after(recipe.remove.kinds, self.planned.recipe, given.method)

    def sources(self, before: Left | None) -> list[str]:
        """Return the digests of its model and of the files that it reads."""
        return [self._run(before).source_digest(), _files_read(self.planned.recipe)]

    def finished(self, before: Left | None) -> Left | None:
        """Return what lies whole in its folder; where only the report's name is wanting, it gets that."""
        recipe = self._run(before).recipe
        if self.name == "train":
            trained = finished_training(recipe)
            return None if trained is None else Left(trained, trained.saved_model)
        model = recipe.output.model
        if (report := announced(recipe)) is not None:
            finish_run_folder(recipe, report)
        elif (recipe.run_folder / REPORT_FILE).is_file() and (model is None or holds_model(model)):
            report = Report.read(recipe.run_folder / REPORT_FILE)
        return None if report is None else Left(report, model)

    def clear(self) -> None:
        """Remove the model of the run, and what is there of it."""
        if (model := self.planned.recipe.output.model) is not None:
            discard_unfinished(model)
            if is_coprunes(model):
                shutil.rmtree(model)

    def run(self, before: Left | None, taking: Taking) -> Left:
        """Do the step."""
        run = self._run(before)

        @contextmanager
        def taken() -> Iterator[None]:
            with taking():
                yield
                if run.write:  # the whole run's where that is all
                    write_text(run.recipe.run_folder / RECIPE_FILE, run.recipe.untold().to_yaml())

        run.taking = taken if self.is_one_of_several else taking
        if self.name == "train":
            trained = train(run)
            return Left(trained, trained.saved_model)
        result = _DO[self.planned.name](run)
        return Left(result.report, result.report.saved_model, result)

    def _run(self, before: Left | None) -> Run:
        """Return the step as a run, with the source that the step before left, and its choice of how texts begin."""
        whole, recipe = self.whole, self.planned.recipe
        if before is None:
            return replace(whole, recipe=recipe)
        assert isinstance(before.record, Report)
        report, found, loaded = before.record, dict[str, Any](), None
        if report.bos is not None and report.bos.used != "as given":
            found["bos"] = report.bos.used  # as the dense model spoke for, so that all figures are of the same windows
        if self.name == "train" and report.perplexity and report.model.task in ("text", "masked"):
            found["finetune_eval_seqlen"] = report.perplexity[0].seqlen
        if before.model is None:
            if before.held is None or before.held.held is None:
                wrong = "cutting and pruning a streamed model needs a run folder for the intermediate model"
                raise BadInput(wrong, field="save", fix=("name one with ", Setting("save")))
            loaded = Loaded(InMemory(before.held.held), before.held.processor, report.model.source, False)
        given = Given(loaded, whole.given.method)
        return Run(recipe.replaced(**found), given, whole.reporter, whole.processes, whole.write)
