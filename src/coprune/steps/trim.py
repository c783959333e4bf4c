"""A run that cuts the vocabulary: by itself, or before all else that is asked for, which begins with the folder it leaves."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from coprune.base.errors import BadInput, about
from coprune.base.files import require_usable, write_text
from coprune.base.memory import peak_memory
from coprune.base.words import Command, LeaveOut, Set, Setting, Words
from coprune.evaluation.asked_texts import text_fingerprint
from coprune.model.checkpoint.digest import source_digest
from coprune.model.checkpoint.load import load_model, load_processor
from coprune.model.checkpoint.locate import GgufFile, ModelFolder, holds_model, locate
from coprune.model.checkpoint.shards import read_json
from coprune.model.loaded_model import choose_device
from coprune.model.removed import Tokens
from coprune.recipe.recipe import Recipe
from coprune.recipe.vocabulary import shares_of
from coprune.report.card import model_card, write_card
from coprune.report.folder import RECIPE_FILE, announce, announced, finish_run_folder
from coprune.report.html import MadeFacts
from coprune.report.schema import ModelFacts, Report, SparsityFacts, installed_versions
from coprune.run.context import Given, Run
from coprune.run.result import Result
from coprune.steps.checks import prepare_folders, replace_earlier
from coprune.steps.to_gguf import require_gguf_source
from coprune.store.notes import read_note, write_note
from coprune.store.store import key_of
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.cut import Asked, Cutting
from coprune.vocabulary.facts import VocabularyFacts
from coprune.vocabulary.sources import Source, saved, source_of

FOLDER = "vocabulary"
"""Subfolder of a run folder for the cut's intermediate results."""
REST = "rest"
_CHOICE, _TRIES, _MODEL = "choice.json", "tries.json", "model"


class _Choice(BaseModel):
    """The chosen tokens, with their facts."""

    model_config = ConfigDict(frozen=True)

    key: str
    """Everything that decides them; empty where nothing is kept."""
    old: tuple[int, ...]
    """Ids of the tokens that stay, in the whole model."""
    facts: VocabularyFacts
    model: ModelFacts

    @property
    def kept(self) -> Kept:
        """The tokens that stay."""
        return Kept(self.old)


def cut_vocabulary(run: Run, do: Callable[[Run], Result]) -> Result:
    """Cut the vocabulary, then do the rest that a recipe asks for.

    Args:
        run: what is asked for.
        do: does the rest.

    Returns:
        The report of all, and the model.

    Raises:
        BadInput, UnsupportedModel: what is asked for cannot be done.
        VerificationError: what was written is not what should be there.
    """
    recipe, rest = run.recipe, rest_of(run.recipe)
    _refuse(run, alone=rest is None)
    key = _key(run) if run.write else ""
    if (
        run.write
        and rest is None
        and (known := announced(recipe)) is not None
        and _known(recipe.run_folder / FOLDER, key)
    ):
        finish_run_folder(recipe, known)
        run.push()
        return Result(known)
    prepare_folders(recipe)
    with _places(recipe, run.write, rest is None) as (target, keep):
        if rest is None:
            return _alone(run, target, keep, key)
        assert target is not None
        choice = _for_rest(run, target, keep, key)
        own = rest.replaced(model=str(target), save=recipe.run_folder / REST if run.write else None)
        result = do(Run(own, Given(method=run.given.method), run.reporter, run.processes, run.write))
        report = _whole(recipe, choice, result.report, time.perf_counter() - run.began)
        if recipe.output.model is not None:
            write_card(report, recipe.output.model)
        if run.writes:
            announce(recipe, report)
            finish_run_folder(recipe, report)
        run.push()
        model = result.held  # while the folder that it may be read from is there
        return Result(report, result.processor, lambda: model)


def tokens_kept(run_folder: Path) -> list[int]:
    """Return the ids, in the whole model, of the tokens that a run has kept."""
    note = read_note(run_folder / FOLDER / _CHOICE, _Choice)
    assert note is not None
    return [*note.record.old]


def rest_of(recipe: Recipe) -> Recipe | None:
    """Return what is asked for besides the vocabulary; None for nothing."""
    left = recipe.remove.without_vocabulary()
    if not left.parts and not recipe.prune.asks_for_zeros:
        return None
    told = {"push_to_hub": None, "private": None, "overwrite": None}
    return recipe.model_copy(update={"remove": left}).replaced(**told)


def _refuse(run: Run, alone: bool) -> None:
    """Raise BadInput for what such a run does not do."""
    recipe = run.recipe
    if run.processes.size > 1:
        raise BadInput("a vocabulary is cut by one process", field="remove", fix="run it without torchrun")
    model = recipe.output.model
    if not alone:
        if recipe.output.as_gguf:
            both = f"{model} would be a GGUF file, and what else is asked for leaves a folder"
            raise BadInput(both, field="save_model", value=model, fix="name a folder, and export that")
        return
    for field, asked in (("tasks", recipe.evaluate.runs_tasks), ("generate", recipe.evaluate.answers.is_asked)):
        if asked:
            cause: Words = (Setting(field), " is not measured by a run that only cuts a vocabulary")
            later = Command("evaluate", "FOLDER", Set(field, ...))
            raise BadInput(cause, field=field, fix=(LeaveOut(field), ", save the model and run: ", later))


@contextmanager
def _places(recipe: Recipe, write: bool, alone: bool) -> Iterator[tuple[Path | None, Path | None]]:
    """Yield the target of the smaller model (None for nowhere), and the folder for intermediate results."""
    keep = recipe.run_folder / FOLDER if write else None
    if alone and recipe.output.model is not None:
        require_usable(recipe.output.model, "save_model")
        yield recipe.output.model, keep
    elif keep is not None:
        yield (None if alone else keep / _MODEL), keep
    else:
        with tempfile.TemporaryDirectory(prefix="coprune-") as folder:
            yield Path(folder) / "model", None


def _alone(run: Run, target: Path | None, keep: Path | None, key: str) -> Result:
    """Run a vocabulary cut without other changes. target: of the model; keep: of intermediate results."""
    recipe = run.recipe
    to_gguf = _becomes_gguf(recipe, run.given, target)
    with _opened(recipe, run.given, to_gguf) as source:
        choice = _chosen(run, source, keep, key)
        report = _report(recipe, choice, time.perf_counter() - run.began)
        if run.writes:
            announce(recipe, report)  # a run that is killed once the model has its name has only this to finish
        if target is not None:
            source.cut(target, choice.kept, run.reporter, "" if to_gguf else model_card(report))
    report = run.finish(report)
    run.push()
    if target is None or to_gguf:
        return Result(report)
    where = ModelFolder(target, choice.model.source)
    processor = load_processor(where, "text")
    if recipe.output.model is not None:
        return Result(report, processor, lambda: load_model(where, processed=False)[0])
    model = load_model(where, processed=False)[0]  # its folder goes now
    return Result(report, processor, lambda: model)


def _for_rest(run: Run, target: Path, keep: Path | None, key: str) -> _Choice:
    """Write the smaller model that the rest of the run begins with, unless an interrupted run did."""
    choice = _known(keep, key)
    if choice is not None and holds_model(target):
        return choice
    with _opened(run.recipe, run.given, to_gguf=False) as source:
        choice = _chosen(run, source, keep, key)
        shutil.rmtree(target, ignore_errors=True)
        source.cut(target, choice.kept, run.reporter)
    return choice


def _becomes_gguf(recipe: Recipe, given: Given, target: Path | None) -> bool:
    """Return whether GGUF becomes GGUF. Raises BadInput if another format should become GGUF."""
    is_gguf = given.loaded is None and isinstance(locate(recipe.model.name, recipe.model.cache_dir), GgufFile)
    asked = target is not None and recipe.output.as_gguf
    if asked:
        require_gguf_source(recipe, given)
    return is_gguf and (asked or target is None)


@contextmanager
def _opened(recipe: Recipe, given: Given, to_gguf: bool) -> Iterator[Source]:
    """Yield the source of the cut; a model in memory is saved for it."""
    if given.loaded is None:
        with source_of(locate(recipe.model.name, recipe.model.cache_dir), recipe.model.name, to_gguf) as source:
            yield source
        return
    with (
        saved(given.loaded.model, given.loaded.processor) as folder,
        source_of(ModelFolder(folder, given.loaded.source), given.loaded.source, False) as source,
    ):
        yield source


def _known(keep: Path | None, key: str) -> _Choice | None:
    """Return the choice of an interrupted run that had the same key, or None."""
    note = None if keep is None else read_note(keep / _CHOICE, _Choice)
    return note.record if note is not None and note.record.key == key else None


def _key(run: Run) -> str:
    """Return the key of a choice: the settings, and the contents of the model and of the texts that count."""
    recipe, loaded = run.recipe, run.given.loaded
    if loaded is None:
        model = source_digest(locate(recipe.model.name, recipe.model.cache_dir))
    else:
        backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
        beside = loaded.model.config, loaded.model.generation_config, loaded.tokenizer, backend and backend.to_str()
        model = f"{loaded.fingerprint(())} {beside}"
    texts = shares_of(recipe.remove.vocabulary_text, "vocabulary_text")
    setting = "vocabulary_text" if texts else "dataset"
    contents = []
    for name in texts or (recipe.calibrate.data,):
        with about(setting, name):
            contents.append(text_fingerprint(name))
    return str(key_of("vocabulary", 1, recipe=recipe.whole, model=model, texts=contents))


def _chosen(run: Run, source: Source, keep: Path | None, key: str) -> _Choice:
    """Choose the tokens that stay and measure what that costs, unless an interrupted run did.

    Nothing is written before the recipe is known to be possible; raises BadInput where it is not, or saves too little.
    """
    recipe = run.recipe
    if (known := _known(keep, key)) is not None:
        return known
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
    if recipe.output.overwrite:
        replace_earlier(recipe)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        write_text(recipe.run_folder / RECIPE_FILE, recipe.untold().to_yaml())
    kept, found = cutting.size()
    cutting.refuse_useless(kept)
    facts = cutting.facts(kept, found)
    choice = _Choice(key=key, old=kept.old, facts=facts, model=_model_facts(source, str(asked.device)))
    if (loud := choice.facts.loud()) is not None:
        run.reporter.say(loud)
    if keep is not None:
        shutil.rmtree(keep / _MODEL, ignore_errors=True)  # of another choice
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


def _report(recipe: Recipe, choice: _Choice, seconds: float) -> Report:
    """Return the report of a run without other changes."""
    return Report(
        recipe=recipe,
        model=choice.model,
        calibration=None,
        sparsity=SparsityFacts(target=0.0, matrices=0.0, model=0.0),
        perplexity=[],
        prune_seconds=seconds,
        total_seconds=seconds,
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=None,
        versions=installed_versions(),
        events=[],
        matrices=[],
        saved_model=recipe.output.model,
        edits=[_removed(choice.facts)],
        made=MadeFacts.here(),
        vocabulary=choice.facts,
    )


def _removed(facts: VocabularyFacts) -> Tokens:
    return Tokens(tokens=facts.before, left=facts.after)


def _whole(recipe: Recipe, choice: _Choice, rest: Report, seconds: float) -> Report:
    """Return the report of the later parts, with the cut in front."""
    own = {name: getattr(rest.model, name) for name in ("blocks", "block_names", "device", "dtype", "loaded_by")}
    return rest.model_copy(
        update={
            "recipe": recipe,
            "model": choice.model.model_copy(update=own),
            "edits": [_removed(choice.facts), *rest.edits],
            "left": rest.model.parameters if rest.left is None else rest.left,
            "vocabulary": choice.facts,
            "total_seconds": seconds,
            "peak_memory_bytes": max(peak_memory(), rest.peak_memory_bytes),
        }
    )
