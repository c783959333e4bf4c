"""Trimming: fewer tokens in the vocabulary, and fewer rows in the matrices that belong to them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from coprune.base.errors import BadInput, about
from coprune.base.files import require_usable
from coprune.base.words import Command, LeaveOut, Set, Setting, Words
from coprune.evaluation.asked_texts import text_fingerprint
from coprune.model.blocks import Block
from coprune.model.checkpoint.digest import source_digest
from coprune.model.checkpoint.load import load_model, load_processor
from coprune.model.checkpoint.locate import GgufFile, ModelFolder, locate
from coprune.model.checkpoint.shards import read_json
from coprune.model.loaded_model import choose_device
from coprune.model.matrix_choice import Chosen
from coprune.model.removed import Tokens
from coprune.recipe.parts import PrunePart
from coprune.recipe.recipe import Recipe
from coprune.recipe.train_part import TrainPart
from coprune.recipe.vocabulary_cut import shares_of
from coprune.report.run_folder import announce
from coprune.report.schema import ModelFacts
from coprune.run.context import Given, Run
from coprune.run.report_facts import report_without_walk
from coprune.run.result import Result
from coprune.run.step import Left
from coprune.stages.to_gguf import require_gguf_source
from coprune.steps.recipe_step import UNASKED, UNTOLD, StepOfRecipe
from coprune.store.notes import read_note, write_note
from coprune.store.store import key_of
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.cut import Asked, Cutting
from coprune.vocabulary.cut_facts import VocabularyFacts
from coprune.vocabulary.cut_sources import Source, saved, source_of

FOLDER = "vocabulary"
"""Subfolder of a run folder for intermediate results."""
_CHOICE, _TRIES = "choice.json", "tries.json"


class _Choice(BaseModel):
    """The chosen tokens and their figures."""

    model_config = ConfigDict(frozen=True)

    key: str
    """Key of everything that decides them; empty if nothing is stored."""
    old: tuple[int, ...]
    """Ids of the kept tokens in the whole model."""
    facts: VocabularyFacts
    model: ModelFacts

    @property
    def kept(self) -> Kept:
        """The kept tokens."""
        return Kept(self.old)


class Trim(StepOfRecipe):
    """Cuts the vocabulary."""

    name = "trim"
    leaves_dense = True

    @classmethod
    def is_asked(cls, recipe: Recipe) -> bool:
        return recipe.remove.vocabulary is not None

    @classmethod
    def part_of(cls, recipe: Recipe) -> Recipe:
        alone = {"remove": recipe.remove.vocabulary_alone(), "prune": PrunePart(), "train": TrainPart()}
        own = recipe.model_copy(update=alone)
        return own.replaced(**UNASKED, **UNTOLD, tasks=None, eval_zero_shot=False)

    @classmethod
    def told(cls, recipe: Recipe, chosen: Chosen, blocks: Sequence[Block]) -> str:
        return f"cut tokens and their rows: {', '.join(recipe.remove.parts)}"

    def check(self) -> None:
        check_trim(self.whole.recipe, self.whole.processes.size)

    def do(self, run: Run) -> Left:
        return Left.of(trim(run))


def after_trim(recipe: Recipe) -> Recipe | None:
    """Return what a run does once it has cut a vocabulary; None for nothing."""
    left = recipe.model_copy(update={"remove": recipe.remove.without_vocabulary()})
    return left if left.remove.parts or recipe.sets_zeros else None


def trim(run: Run) -> Result:
    """Cut the vocabulary.

    Args:
        run: the run.

    Returns:
        The report and the smaller model.

    Raises:
        BadInput, UnsupportedModel: the request cannot be fulfilled.
        VerificationError: the written model differs from the planned one.
    """
    recipe = run.recipe
    with ExitStack() as closing:
        target = recipe.output.model
        if target is not None:
            require_usable(target, "save_model")
        elif not run.write:
            target = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="coprune-"))) / "model"
        to_gguf = _becomes_gguf(recipe, run.given, target)
        with _opened(recipe, run.given, to_gguf) as source:
            choice = _chosen(run, source)
            removed = Tokens(tokens=choice.facts.before, left=choice.facts.after)
            report = report_without_walk(run, choice.model, edits=[removed], vocabulary=choice.facts)
            if run.writes:
                announce(recipe, report)  # so that a run killed after the model is named has nothing else to finish
            if target is not None:
                source.cut(target, choice.kept, run.reporter)
        report = run.finish(report)
        if target is None or to_gguf:
            return Result(report)
        where = ModelFolder(target, choice.model.source)
        processor = load_processor(where, "text")
        if recipe.output.model is not None:
            return Result(report, processor, lambda: load_model(where, processed=False)[0])
        model = load_model(where, processed=False)[0]  # its folder is deleted on return
        return Result(report, processor, lambda: model)


def tokens_kept(run_folder: Path) -> list[int]:
    """Return the whole model's ids of the tokens that a run kept."""
    note = read_note(run_folder / FOLDER / _CHOICE, _Choice)
    assert note is not None
    return [*note.record.old]


def check_trim(recipe: Recipe, processes: int) -> None:
    """Raise BadInput for settings that trimming does not support. recipe: of the whole run."""
    if processes > 1:
        raise BadInput("a vocabulary is cut by one process", field="remove", fix="run it without torchrun")
    model = recipe.output.model
    if recipe.remove.kinds or recipe.prune.asks_for_zeros:
        if recipe.output.as_gguf:
            both = f"{model} would be a GGUF file, but the other steps of this run leave a folder"
            raise BadInput(both, field="save_model", value=model, fix="name a folder, and export that")
        return
    for field, asked in (("tasks", recipe.evaluate.runs_tasks), ("generate", recipe.evaluate.answers.is_asked)):
        if asked:
            cause: Words = (Setting(field), " is not measured by a run that only cuts a vocabulary")
            later = Command("evaluate", "FOLDER", Set(field, ...))
            raise BadInput(cause, field=field, fix=(LeaveOut(field), ", save the model and run: ", later))


def _becomes_gguf(recipe: Recipe, given: Given, target: Path | None) -> bool:
    """Return whether a GGUF file becomes a GGUF file. Raises BadInput if another format should become GGUF."""
    is_gguf = given.loaded is None and isinstance(locate(recipe.model.name, recipe.model.cache_dir), GgufFile)
    asked = target is not None and recipe.output.as_gguf
    if asked:
        require_gguf_source(recipe, given)
    return is_gguf and (asked or target is None)


@contextmanager
def _opened(recipe: Recipe, given: Given, to_gguf: bool) -> Iterator[Source]:
    """Yield the source of the cut; a model in memory is saved first."""
    if given.loaded is None:
        with source_of(locate(recipe.model.name, recipe.model.cache_dir), recipe.model.name, to_gguf) as source:
            yield source
        return
    with (
        saved(given.loaded.model, given.loaded.processor) as folder,
        source_of(ModelFolder(folder, given.loaded.source), given.loaded.source, False) as source,
    ):
        yield source


def _key(run: Run) -> str:
    """Return the key of a choice: the settings, and the contents of the model and the counted texts."""
    recipe = run.recipe
    texts = shares_of(recipe.remove.vocabulary_text)
    setting = "vocabulary_text" if texts else "dataset"
    contents = []
    for name in texts or (recipe.calibrate.data,):
        with about(setting, name):
            contents.append(text_fingerprint(name))
    return str(key_of("vocabulary", 1, recipe=recipe.whole, model=run.source_digest(), texts=contents))


def _chosen(run: Run, source: Source) -> _Choice:
    """Choose the tokens to keep and measure the cost, unless an interrupted run did.

    Nothing is written before the recipe is known to work. Raises BadInput if it cannot, or if it saves too little.
    """
    recipe, keep = run.recipe, run.recipe.run_folder / FOLDER if run.write else None
    key = "" if keep is None else _key(run)
    note = None if keep is None else read_note(keep / _CHOICE, _Choice)
    if keep is not None and note is not None and note.record.key == key:
        with run.taking():
            write_note(keep / _CHOICE, note.record)  # even if an earlier run's folder was deleted since
        return note.record
    asked = Asked(
        structure=recipe.remove,
        data=recipe.calibrate.data,
        cache_dir=recipe.model.cache_dir,
        dtype=recipe.model.dtype,
        device=choose_device(recipe.model.device),
        runs=recipe.evaluate.perplexity and recipe.model.stream is not True,
        tokens=recipe.evaluate.tokens,
        state=None if keep is None else keep / _TRIES,
        key=key,
    )
    cutting = Cutting(source, asked, run.reporter)
    cutting.require_possible()
    with run.taking():
        pass  # all checks have passed by now
    kept, found = cutting.size()
    cutting.refuse_useless(kept)
    facts = cutting.facts(kept, found)
    choice = _Choice(key=key, old=kept.old, facts=facts, model=_model_facts(source, str(asked.device)))
    if (warning := choice.facts.warning()) is not None:
        run.reporter.say(warning)
    if keep is not None:
        write_note(keep / _CHOICE, choice)
    return choice


def _model_facts(source: Source, device: str) -> ModelFacts:
    location = source.location
    config = {} if isinstance(location, GgufFile) else read_json(location.path / "config.json")
    text = config.get("text_config") or config
    return ModelFacts(
        source=location.name,
        model_type=str(config.get("model_type", "GGUF")),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "as stored"),
        device=device,
        blocks=int(text.get("num_hidden_layers") or 0),
        parameters=source.parameters,
        quantised_source=isinstance(location, GgufFile),
        digest=source_digest(location),
    )
