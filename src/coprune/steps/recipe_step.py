"""A step of a recipe, in the folders and with the report of a run."""

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
from coprune.removal.unit_scores import SPREADINGS
from coprune.report.run_folder import RECIPE_FILE, REPORT_FILE, announced, finish_run_folder
from coprune.report.schema import Report
from coprune.run.context import Given, Run
from coprune.run.step import Left, Step, Taking
from coprune.stages.checks import check_zeros_after
from coprune.stages.to_gguf import refuse_other_changes
from coprune.steps.joined import report_with_change

UNTOLD: dict[str, Any] = {"report_to": None, "log_json": None}
"""Settings of a recipe that hears of the whole run elsewhere."""
UNIFORM = Choice(name="uniform")
UNASKED: dict[str, Any] = {"generate": None, "require": None}
"""Settings of a recipe whose model is not asked anything."""


@dataclass(frozen=True, kw_only=True)
class StepOfRecipe(Step):
    """A step that a recipe comes to: it changes the run's model, or what the step before left."""

    leaves_dense: ClassVar[bool] = False
    """Whether the steps after it take what it leaves for the dense model."""
    always_saves: ClassVar[bool] = False
    """Whether it leaves a model in a folder, also where nobody asks for that."""

    recipe: Recipe
    """Its own."""
    whole: Run
    """The run that it is a step of."""
    is_one_of_several: bool

    @classmethod
    def of(cls, recipe: Recipe, folder: Path | None, run: Run, is_one_of_several: bool) -> Self:
        """Return a step with the settings of its own that decide its result, and what is measured of it."""
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
        """Return whether a recipe comes to this step."""

    @classmethod
    @abstractmethod
    def part_of(cls, recipe: Recipe) -> Recipe:
        """Return the recipe of this step alone, where a recipe comes to several."""

    @classmethod
    @abstractmethod
    def told(cls, recipe: Recipe, chosen: Chosen, blocks: Sequence[Block]) -> str:
        """Return in a line what it would do. recipe: its own. Raises BadInput for what shapes show to be impossible."""

    @abstractmethod
    def do(self, run: Run) -> Left:
        """Do the step as a run of its own."""

    def joined(self, recipe: Recipe, before: Report, own: BaseModel) -> Report:
        """Return the report of the steps so far.

        Args:
            recipe: of all steps.
            before: the report of those before this one.
            own: the record of this one.
        """
        assert isinstance(own, Report)
        return report_with_change(recipe, before, own)

    def check(self) -> None:
        """Check what would otherwise be found late. Raises BadInput."""
        recipe, given = self.whole.recipe, self.whole.given
        if recipe.output.as_gguf:
            refuse_other_changes(recipe, given)
        elif self.is_one_of_several:
            check_zeros_after(recipe.remove.kinds, self.recipe, given.method)

    def sources(self, before: Left | None) -> list[str]:
        """Return the digests of its model and of the files that it reads."""
        return [self._as_run(before).source_digest(), _files_read(self.recipe)]

    def finished(self, before: Left | None) -> Left | None:
        """Return what lies whole in its folder; where only the report's name is wanting, it gets that."""
        recipe = self._as_run(before).recipe
        model = recipe.output.model
        if (report := announced(recipe)) is not None:
            finish_run_folder(recipe, report)
        elif (recipe.run_folder / REPORT_FILE).is_file() and (model is None or holds_model(model)):
            report = Report.read(recipe.run_folder / REPORT_FILE)
        return None if report is None else Left(report, model)

    def clear(self) -> None:
        """Remove the model of the run, and what is there of it."""
        if (model := self.recipe.output.model) is not None:
            discard_unfinished(model)
            if is_coprunes(model):
                shutil.rmtree(model)

    def run(self, before: Left | None, taking: Taking) -> Left:
        """Do the step, with a recipe in its folder."""
        run = self._as_run(before)

        @contextmanager
        def taken() -> Iterator[None]:
            with taking():
                yield
                if run.write:  # the whole run's where that is all
                    write_text(run.recipe.run_folder / RECIPE_FILE, run.recipe.untold().to_yaml())

        run.taking = taken if self.is_one_of_several else taking
        return self.do(run)

    def found_before(self, report: Report) -> dict[str, Any]:
        """Return settings that the step before has found, so that all figures are of the same windows."""
        if report.bos is None or report.bos.used == "as given":
            return {}
        return {"bos": report.bos.used}  # as the dense model spoke for

    def _as_run(self, before: Left | None) -> Run:
        """Return the step as a run, with the source that the step before left, and its choice of how texts begin."""
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
    """Return the recipe of what comes before a training, which asks the model itself."""
    if recipe.train.mode is None:
        return recipe
    return recipe.model_copy(update={"train": TrainPart()}).replaced(**UNASKED)


def allocates_units(recipe: Recipe) -> bool:
    """Return whether a recipe's allocation is of channels and heads over blocks, and not of zeros over matrices."""
    return recipe.remove.spreads and recipe.prune.allocation.name in SPREADINGS


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
