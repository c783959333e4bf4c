"""The steps that make up a recipe's run."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel

from coprune.base.errors import BadInput
from coprune.base.files import digest_of_files, write_text
from coprune.base.words import Setting
from coprune.data.local_text import split_column
from coprune.evaluation.asked_texts import split_texts
from coprune.model.blocks import Block
from coprune.model.checkpoint.locate import holds_model
from coprune.model.checkpoint.weights import InMemory
from coprune.model.checkpoint.writer import discard_unfinished
from coprune.model.edits import is_coprunes
from coprune.model.loaded_model import Loaded
from coprune.model.matrix_choice import Chosen
from coprune.recipe.choice import Choice
from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import split_sources
from coprune.recipe.train_part import TrainPart
from coprune.recipe.vocabulary_cut import shares_of
from coprune.removal.unit_scores import UNIT_ALLOCATIONS
from coprune.report.run_folder import RECIPE_FILE, REPORT_FILE, announced, finish_run_folder
from coprune.report.schema import Report
from coprune.run.context import Given, Run
from coprune.run.step import Left, Step, Taking
from coprune.stages.checks import check_zeros_after
from coprune.stages.to_gguf import refuse_other_changes
from coprune.steps.joined import report_with_change

UNTOLD: dict[str, Any] = {"report_to": None, "log_json": None}
"""Settings that keep a step from logging, since the whole run logs."""
UNIFORM = Choice(name="uniform")
UNASKED: dict[str, Any] = {"generate": None, "require": None}
"""Settings that keep a step's model from answering prompts."""


@dataclass(frozen=True, kw_only=True)
class StepOfRecipe(Step):
    """A step of a recipe: it changes the run's model, or the result of the step before."""

    leaves_dense: ClassVar[bool] = False
    """Whether later steps treat its result as the dense model."""
    always_saves: ClassVar[bool] = False
    """Whether it saves its model even if that was not requested."""

    recipe: Recipe
    """The recipe of this step."""
    whole: Run
    """The whole run."""
    is_one_of_several: bool

    @classmethod
    def of(cls, recipe: Recipe, folder: Path | None, run: Run, is_one_of_several: bool) -> Self:
        """Return a step, whose key holds the settings that decide its result."""
        texts = _digest_of([text.name for text in split_texts(recipe.evaluate.data)])
        return cls(
            folder=folder if run.write else None,
            settings={name: value for name, value in recipe.deciding(Decides.RESULT).items() if name != "model"},
            measured=recipe.deciding(Decides.MEASUREMENT) | {"texts to measure on": texts},
            recipe=recipe,
            whole=run,
            is_one_of_several=is_one_of_several,
        )

    @classmethod
    @abstractmethod
    def is_asked(cls, recipe: Recipe) -> bool:
        """Return whether a recipe requires this step."""

    @classmethod
    @abstractmethod
    def part_of(cls, recipe: Recipe) -> Recipe:
        """Return the recipe of this step alone, from one of several steps."""

    @classmethod
    @abstractmethod
    def told(cls, recipe: Recipe, chosen: Chosen, blocks: Sequence[Block]) -> str:
        """Describe the step in one line. recipe: of this step. Raises BadInput if the shapes show it to be impossible."""

    @abstractmethod
    def do(self, run: Run) -> Left:
        """Execute the step as a run."""

    def joined(self, recipe: Recipe, before: Report, own: BaseModel) -> Report:
        """Return the report of the steps so far.

        Args:
            recipe: the recipe of all steps.
            before: the report of the steps before this one.
            own: the record of this step.
        """
        assert isinstance(own, Report)
        return report_with_change(recipe, before, own)

    def check(self) -> None:
        """Check early what would otherwise fail late. Raises BadInput."""
        recipe, given = self.whole.recipe, self.whole.given
        if recipe.output.as_gguf:
            refuse_other_changes(recipe, given)
        elif self.is_one_of_several:
            check_zeros_after(recipe.remove.kinds, self.recipe, given.method)

    def sources(self, before: Left | None) -> list[str]:
        """Return the digests of its source model and of the files that it reads."""
        return [self._as_run(before).source_digest(), _files_read(self.recipe)]

    def finished(self, before: Left | None) -> Left | None:
        """Return the finished result in its folder, if any; a report that was only announced is finished first."""
        recipe = self._as_run(before).recipe
        model = recipe.output.model
        if (report := announced(recipe)) is not None:
            finish_run_folder(recipe, report)
        elif (recipe.run_folder / REPORT_FILE).is_file() and (model is None or holds_model(model)):
            report = Report.read(recipe.run_folder / REPORT_FILE)
        return None if report is None else Left(report, model)

    def clear(self) -> None:
        """Remove its model, finished or not."""
        if (model := self.recipe.output.model) is not None:
            discard_unfinished(model)
            if is_coprunes(model):
                shutil.rmtree(model)

    def run(self, before: Left | None, taking: Taking) -> Left:
        """Execute the step and write its recipe into its folder."""
        run = self._as_run(before)

        @contextmanager
        def taken() -> Iterator[None]:
            with taking():
                yield
                if run.write:  # for a run of one step, that of the run
                    write_text(run.recipe.run_folder / RECIPE_FILE, run.recipe.as_stored().to_yaml())

        run.taking = taken if self.is_one_of_several else taking
        return self.do(run)

    def found_before(self, report: Report) -> dict[str, Any]:
        """Return settings decided by the step before, so that all steps measure the same windows."""
        if report.bos is None or report.bos.used == "as given":
            return {}
        return {"bos": report.bos.used}  # decided by the dense model

    def _as_run(self, before: Left | None) -> Run:
        """Return the step as a run, on the result of the step before and with its decisions."""
        whole = self.whole
        if before is None:
            return replace(whole, recipe=self.recipe)
        assert isinstance(before.record, Report)
        report, loaded = before.record, None
        if before.model is None:
            if before.held is None or before.held.held is None:
                wrong = "cutting and pruning a streamed model needs a run folder for the intermediate model"
                raise BadInput(wrong, field="save", fix=("name one with ", Setting("save")))
            loaded = Loaded(InMemory(before.held.held), before.held.processor, report.model.source, False)
        recipe, given = self.recipe.replaced(**self.found_before(report)), Given(loaded, whole.given.method)
        return Run(recipe, given, whole.reporter, whole.processes, whole.write)


def without_training(recipe: Recipe) -> Recipe:
    """Return the recipe of the steps before training; training itself lets the model answer prompts."""
    if recipe.train.mode is None:
        return recipe
    return recipe.model_copy(update={"train": TrainPart()}).replaced(**UNASKED)


def allocates_units(recipe: Recipe) -> bool:
    """Return whether a recipe allocates channels and heads to blocks, rather than zeros to matrices."""
    return recipe.remove.removes_units and recipe.prune.allocation.name in UNIT_ALLOCATIONS


def _files_read(recipe: Recipe) -> str:
    """Return the digest of all files besides the model that decide a recipe's result."""
    names = [source.prompts or source.name for source in split_sources(recipe.calibrate.data)]
    names += [*recipe.remove.texts.values(), *shares_of(recipe.remove.vocabulary_text)]
    names += [] if recipe.remove.kept_scores is None else [str(recipe.remove.kept_scores)]
    names += [recipe.prune.allocation.name] if recipe.prune.allocation.is_file else []
    return _digest_of(names)


def _digest_of(names: Sequence[str]) -> str:
    """Return the digest of those names that are files."""
    return digest_of_files((path for name in names if (path := split_column(name)[0]).is_file()), named=False)
