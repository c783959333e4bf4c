"""What a run gathers before it changes anything: first without the blocks' weights, then with the proof of the walk."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from transformers import PreTrainedModel

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, UnsupportedModel, about
from coprune.base.memory import return_free_memory
from coprune.base.precision import SLOW_IN_BFLOAT16, multiplies_bfloat16
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Reporter
from coprune.base.words import Set, say
from coprune.data import EvaluationText, Windows
from coprune.data.corpora import EMBEDDED, HUB_CORPORA
from coprune.data.hub import require_dataset
from coprune.evaluation.bos_choice import BosChoice, score_of
from coprune.evaluation.extras import Extras
from coprune.evaluation.measurement import Measured
from coprune.evaluation.result_cache import plain_names
from coprune.evaluation.tasks import Data, Remember, Samples, Task, TextTask, read_anew, task_for
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.locate import locates_gguf
from coprune.model.edits import require_history
from coprune.model.loaded_model import Loaded, open_model, say_of_bfloat16, streams
from coprune.model.low_rank_factors import noting_calls
from coprune.model.matrix_choice import choose_matrices
from coprune.model.walk.activations import GIB, Activations, device_room
from coprune.model.walk.block_events import Known
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.model.walk.prove import prove_replay
from coprune.model.walk.recording import Recording
from coprune.pruning.allocation import allocation_named
from coprune.pruning.methods import Method
from coprune.pruning.pruner import Solver
from coprune.pruning.refine.reconstruct import Reconstruction
from coprune.recipe.pattern import Target
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import split_sources
from coprune.run.checks import (
    check_allocation,
    check_processes,
    check_rank,
    check_widths,
    needs_inputs,
    prepare_reconstruction,
    prepare_solver,
    reads_calibration,
)
from coprune.run.low_rank import wrap_layers
from coprune.run.memory_bound import Estimate, TextSizes, bound_run


@dataclass(frozen=True)
class Surroundings:
    """Who hears of a run, who does it together, and whether this one leaves a run folder."""

    reporter: Reporter
    processes: Processes = ALONE
    writes: bool = False
    whole: Recipe | None = None
    """The run that prunes and then trains, where this is its half that prunes: what the run folder's recipe is of."""
    replaces: Recipe | None = None
    """The run of two halves whose earlier result goes once all is checked, where this is the first of them."""


@dataclass(frozen=True)
class Opened:
    """A run that has read its data, and nothing of its blocks."""

    recipe: Recipe
    solver: Solver
    target: Target
    loaded: Loaded
    found: FoundModel
    task: Task
    samples: Samples | None
    data: dict[str, Data]
    around: Surroundings
    started: float
    bos: BosChoice | None = None
    """How windows of text begin, once that is settled."""
    domains: Mapping[str, Windows] = field(default_factory=dict)
    """Samples of every domain that experts are scored on."""

    @property
    def looked_at(self) -> Samples | None:
        """Samples to try things on: of the calibration text, or of the first domain."""
        return self.samples if self.samples is not None else next(iter(self.domains.values()), None)

    @property
    def fingerprint(self) -> str | None:
        """Names everything that the model is calibrated on."""
        own = {} if self.samples is None else {"": self.samples}
        found = [f"{name} {one.fingerprint}".strip() for name, one in {**own, **self.domains}.items()]
        return ", ".join(found) or None

    def estimate(self) -> Estimate | None:
        """Bound the memory of the run; None for models of images."""
        if not isinstance(self.task, TextTask):
            return None
        texts = [text for text in self.data.values() if isinstance(text, EvaluationText)]
        windows, processes = self.samples if isinstance(self.samples, Windows) else None, self.around.processes.size
        text = TextSizes.of(self.task.seqlen, windows, texts, processes)
        return bound_run(self.recipe, self.solver, text, self.loaded, self.found, processes)

    def activations(self, lists: int = 1) -> Activations:
        """An empty list of hidden states within the recipe's limits, or one of several that share the limits.

        What is beyond goes beside the run folder, whose disk is meant for large files, or to the folder for temporary ones.
        """
        asked, folder = self.recipe.calibrate, self.recipe.run_folder
        limit = None if asked.activation_memory is None else int(asked.activation_memory * GIB / lists)
        room = device_room(self.loaded.device, asked.device_activation_memory)
        own = None if room is None else replace(room, nbytes=room.nbytes // lists)
        return Activations(limit=limit, folder=folder if folder.is_dir() else None, room=own)


@dataclass(frozen=True)
class Session:
    """All that a run has gathered before it changes anything."""

    opened: Opened
    model: ProvenModel
    reconstruction: Reconstruction | None
    not_added: Sequence[str] = ()
    """Pruned matrices to which nothing of low rank can be added, with reasons, where that is asked for."""


def open_run(recipe: Recipe, given: Given, around: Surroundings, remember: Remember = read_anew) -> Opened:
    """Check everything that can be checked without the blocks, cheap things first, and read the data.

    Args:
        recipe: what is asked for.
        given: what is taken instead of what the recipe names.
        around: who hears of the run, and who does it together.
        remember: where tokenised texts come from, if they were tokenised before.

    Raises:
        BadInput, UnsupportedModel: for what cannot be done as asked.
    """
    started = time.perf_counter()
    if recipe.evaluate.perplexity and recipe.evaluate.data is not None:
        plain_names(recipe.evaluate.data)
    solver, target = prepare_solver(recipe, given.method)
    if not recipe.remove.parts:
        allocation_named(recipe.prune.allocation)
    check_processes(recipe, around.processes.size)
    reporter, loaded = around.reporter, given.loaded
    require_history(expand_home(recipe.model.name))
    if loaded is None:
        if needs_inputs(recipe, solver):
            _require_reach(recipe)
        reporter.say(f"Loading {recipe.model.name}")
        loaded = open_model(recipe.model, stream=streams(recipe))
    say_of_bfloat16(reporter, loaded, given.loaded is None, ", and saves float32")
    _say_of_trained(recipe, loaded, reporter)
    blocks = find_blocks(loaded.model)
    found = FoundModel(
        loaded.weights,
        blocks,
        choose_matrices(loaded.model, blocks, recipe.prune.include, recipe.prune.exclude),
    )
    if "experts" in recipe.remove.shares:
        from coprune.run.to_removal import may_have_experts

        if not may_have_experts(found):
            raise UnsupportedModel("the model has no mixture of experts that tokens are routed to")
    # Whether parameters of three dimensions are experts shows when the model runs.
    check_widths((matrix for matrix in found.chosen.all() if matrix.expert is None), target)
    check_allocation(recipe, found, target)
    check_rank((matrix for block in found.chosen.blocks for matrix in block), recipe.prune.low_rank.rank)
    task = task_for(recipe, loaded, around.processes, remember)
    samples = task.calibration(needs_inputs(recipe, solver), reporter) if reads_calibration(recipe) else None
    domains = _domains(recipe, loaded, around, remember)
    data = task.evaluation(reporter)
    return_free_memory()  # tokenising a corpus takes some hundred bytes a token for a while
    return Opened(recipe, solver, target, loaded, found, task, samples, data, around, started, domains=domains)


def _require_reach(recipe: Recipe) -> None:
    """Raise BadInput where the text is a corpus of the Hub, which does not answer: before a model is loaded."""
    reads_text = "data" in recipe.calibrate.model_fields_set or locates_gguf(recipe.model.name)
    for source in split_sources(recipe.calibrate.data) if reads_text and reads_calibration(recipe) else ():
        corpus = HUB_CORPORA.get(source.name)
        if corpus is not None and source.name not in EMBEDDED:
            with about("dataset", recipe.calibrate.data):
                require_dataset(corpus.dataset, recipe.model.cache_dir, Set("dataset", "embedded"))


def _say_of_trained(recipe: Recipe, loaded: Loaded, reporter: Reporter) -> None:
    """Say where bfloat16 was asked for, and a processor that lacks its products does without."""
    # A training afterwards speaks for itself.
    if recipe.prune.reconstruct.dtype == "bfloat16" and not multiplies_bfloat16(loaded.device):
        reporter.say(f"{SLOW_IN_BFLOAT16} So what is trained computes in float32.")


def _domains(recipe: Recipe, loaded: Loaded, around: Surroundings, remember: Remember) -> dict[str, Windows]:
    """Samples of every domain. Raises BadInput where a model does not read text."""
    found = {}
    for name, text in recipe.remove.texts.items():
        task = task_for(recipe.replaced(dataset=text), loaded, around.processes, remember)
        samples = task.calibration(True, around.reporter)
        if not isinstance(samples, Windows):
            raise BadInput("domains are of text", field="domains", value=text)
        found[name] = samples
    return found


def prove_run(opened: Opened) -> Session:
    """Prove that the model can be walked, and say what is left alone.

    Raises:
        UnsupportedModel, NumericalError, BadInput: as `prove_replay`; also if the pattern does not fit a matrix.
    """
    with noting_calls(opened.found.chosen.all()) as called:
        model = prove_replay(opened.found, opened.task.probe(opened.looked_at, opened.data))
    check_widths(model.chosen.all(), opened.target)
    for left_out in [*model.chosen.left_out, *opened.loaded.left_out]:
        opened.around.reporter.say(f"Left alone: {left_out}.")
    settled, reconstruction = _settle_bos(opened, model), prepare_reconstruction(opened.recipe)
    not_added = wrap_layers(model, called) if opened.recipe.prune.low_rank.rank else []
    for name in not_added:
        opened.around.reporter.say(f"Nothing is added to {name}.")
    return Session(settled, model, reconstruction, not_added)


def _settle_bos(opened: Opened, model: ProvenModel) -> Opened:
    """The same with windows of text that begin as the recipe says, or as the dense model speaks for."""
    task, recipe = opened.task, opened.recipe
    if not isinstance(task, TextTask) or not (opened.looked_at or opened.data):
        return opened
    choice = task.choose_bos(score_of(model, opened.activations()), opened.looked_at, opened.data)
    if (line := choice.line()) is not None:
        opened.around.reporter.say(f"The token that begins a text: {line}.")
        if recipe.calibrate.bos == "auto" and choice.used == "every":
            usual = ("The papers' way, once at the start of the text, is ", Set("bos", "first"), ".")
            opened.around.reporter.say(say(usual))
    domains = {name: task.samples_begun(choice, one) for name, one in opened.domains.items()}
    samples = opened.samples
    if isinstance(samples, Windows):
        samples = task.samples_begun(choice, samples)
    data = task.data_begun(choice, opened.data)
    return replace(opened, samples=samples, data=data, bos=choice, domains=domains)


Tokens = TypeVar("Tokens")


class Reuse:
    """Takes nothing over: everything is done anew."""

    def tokens(self, key: tuple[Hashable, ...], read: Callable[[], Tokens]) -> Tokens:
        """Text as token ids. key: what decides them besides the model; read: tokenises the text."""
        return read()

    def estimate(self, estimate: Callable[[], Estimate | None]) -> Estimate | None:
        """What the run will take."""
        return estimate()

    def dense(
        self, session: Session, extras: Extras, measure: Callable[[], dict[str, Measured]]
    ) -> dict[str, Measured]:
        """The dense model's figures by the name of the data; also fills in what else is measured."""
        return measure()

    def gathered(
        self, session: Session, finished: Mapping[str, object], record: Callable[[], Recording | None]
    ) -> Known:
        """What is known of the blocks' inputs before the run's own walk; in `dense` propagation of all blocks or none.

        finished: blocks that an earlier run finished, of which nothing is known; record: records the calibration batches.
        """
        return {}


@dataclass(frozen=True)
class Given:
    """Objects that a run takes instead of what its recipe names."""

    loaded: Loaded | None = None
    """A model that is open already."""
    method: Method | None = None
    """The method that the recipe tells of but cannot name."""
    line: str | None = None
    """What to say first, where the call left something open."""

    @property
    def model(self) -> PreTrainedModel | None:
        """The model that is open already."""
        return None if self.loaded is None else self.loaded.model


NOTHING = Given()
