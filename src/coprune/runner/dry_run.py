"""A preview of a run: its steps, its memory, time and bytes, and what its folders already hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.base.words import Sheet, Shown, duration
from coprune.evaluation.tasks.text_task import choose_seqlen
from coprune.model.bare_configuration import Imagined
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.locate import GgufFile, Location, locate
from coprune.model.checkpoint.mapped_gguf import LazyGguf
from coprune.model.loaded_model import Loaded, choose_device, outline, streams
from coprune.model.matrix_choice import choose_matrices
from coprune.recipe.recipe import Recipe
from coprune.report.run_folder import RECIPE_FILE, REPORT_FILE, prepare_folders
from coprune.run.memory_estimate import Estimate
from coprune.runner.plan import plan_of
from coprune.runner.prune_call import estimate_shapes
from coprune.runner.time_estimate import Tokens, seconds_of
from coprune.stages.checks import prepare_solver
from coprune.steps.saved_size import SavedSize, saved_size
from coprune.steps.trim import after_trim


@dataclass(frozen=True, repr=False)
class DryRun(Shown):
    """A preview of a run."""

    recipe: Recipe
    model: str
    """The model, and how it would be opened."""
    steps: tuple[str, ...]
    memory: Estimate | None
    """None unless the model is a language model and more than its vocabulary is cut."""
    seconds: float | None
    size: SavedSize
    there: tuple[tuple[str, str], ...]
    """Each output path with its present content."""
    refused: str | None
    """The error with which the run would be refused, if any."""

    def headline(self) -> str:
        """Return the model and the steps in one line."""
        return f"{self.recipe.model.name}: {'; '.join(self.steps)}"

    def sheet(self) -> Sheet:
        """Return all facts."""
        rows = [("model", self.model)]
        rows += [(f"step {number}", step) for number, step in enumerate(self.steps, 1)]
        memory = "not estimated for this run" if self.memory is None else self.memory.headline()
        rows.append(("memory", memory))
        if self.seconds is not None:
            tasks = ", without the tasks" if self.recipe.evaluate.runs_tasks else ""
            rows.append(("time", f"about {duration(self.seconds)} here if idle, to a factor of two{tasks}"))
        rows += [("bytes", self.size.line()), *self.there]
        if self.refused is not None:
            rows.append(("refused", self.refused))
        return Sheet(self.headline(), rows)


def dry_run(recipe: Recipe, reporter: Reporter) -> DryRun:
    """Preview a run, without writing anything or reading weights and texts.

    Raises:
        BadInput: as the run would, for everything that can be checked without weights and texts.
        UnsupportedModel: the model has no blocks.
    """
    asked = recipe.model
    location = locate(asked.name, asked.cache_dir, weights=False)
    with reporter.libraries():
        loaded = _outline(location, recipe)
    blocks = find_blocks(loaded.model)
    chosen = choose_matrices(loaded.model, blocks, recipe.prune.include, recipe.prune.exclude)
    solver, _ = prepare_solver(recipe)
    left, memory, seconds = recipe if recipe.remove.vocabulary is None else after_trim(recipe), None, None
    if left is not None and loaded.task == "text":
        memory = estimate_shapes(left, loaded, None, reporter)
        seqlen = choose_seqlen(loaded.model, recipe.calibrate.seqlen)
        calibrated = recipe.calibrate.samples * seqlen
        tokens = Tokens(calibrated, recipe.evaluate.tokens or calibrated, seqlen)
        seconds = seconds_of(left, solver, tokens, loaded, chosen.blocks)
    plan, refused = plan_of(recipe, recipe.run_folder), None
    try:
        prepare_folders(recipe, begun=plan[-1].folder is not None)
    except BadInput as error:
        refused = str(error)
    return DryRun(
        recipe,
        _opened(recipe, location, loaded),
        tuple(f"{one.step.name}: {one.step.told(one.recipe, chosen, blocks)}" for one in plan),
        memory,
        seconds,
        saved_size(recipe, location, loaded, blocks),
        tuple(_there(recipe)),
        refused,
    )


def _outline(location: Location, recipe: Recipe) -> Loaded:
    """Return a model without reading its weights."""
    asked = recipe.model
    if not isinstance(location, GgufFile):
        return outline(location, asked)
    model = LazyGguf(location, asked.dtype, "cpu").model
    model.tie_weights()
    return Loaded(Imagined.of(model, choose_device(asked.device)), None, location.name, True)


def _opened(recipe: Recipe, location: Location, loaded: Loaded) -> str:
    kind = "GGUF file" if isinstance(location, GgufFile) else "folder"
    way = "one block in memory at a time" if streams(recipe) else "whole in memory"
    parameters = f"{loaded.model.num_parameters():,} parameters"
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return f"{location.name}, {parameters}; the {kind} is opened in {dtype} on {loaded.device}, {way}"


def _there(recipe: Recipe) -> list[tuple[str, str]]:
    run, model = recipe.run_folder, recipe.output.model
    places = [("run", run), *([] if model is None else [("model in", model)])]
    return [(name, f"{path}: {_what(path)}") for name, path in places]


def _what(path: Path) -> str:
    if not path.exists():
        return "nothing there yet"
    if path.is_file():
        return f"a file of {path.stat().st_size:,} bytes"
    if (path / REPORT_FILE).is_file():
        return "a finished run"
    if (path / RECIPE_FILE).is_file():
        return "an unfinished run, which the command resumes"
    return "something else" if any(path.iterdir()) else "an empty folder"
