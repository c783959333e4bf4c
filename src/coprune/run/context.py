"""A run: its recipe, its processes, and the results of its stages."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from coprune.base.devices import device_memory, reset_peak
from coprune.base.memory import resident_memory, return_free_memory
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Reporter
from coprune.data.windows import Samples, Windows
from coprune.evaluation.bos_choice import BosChoice
from coprune.evaluation.extra_measurements import Extras
from coprune.evaluation.measurement import Measured
from coprune.evaluation.tasks import Data, Task, texts_of
from coprune.model.blocks import Block
from coprune.model.checkpoint.digest import source_digest
from coprune.model.checkpoint.encoding import DENSE, Encoding, Untouched
from coprune.model.checkpoint.locate import locate
from coprune.model.edits import Edits
from coprune.model.loaded_model import Loaded
from coprune.model.walk.activations import GIB, Activations, device_room
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.pruning.block_training import BlockTraining
from coprune.pruning.methods import Method
from coprune.pruning.pruner import MatrixResult, Solver
from coprune.pruning.refine.reconstruct import Reconstruction
from coprune.recipe.pattern import Target
from coprune.recipe.recipe import Recipe
from coprune.recipe.structure import RemovePart
from coprune.report.card import write_card
from coprune.report.run_events import AnyEvent
from coprune.report.run_folder import announce, finish_run_folder
from coprune.report.schema import PhaseFacts, Report
from coprune.run.memory_bound import TextSizes, bound_run
from coprune.run.memory_estimate import Estimate
from coprune.run.output import BlockOutcome, Output
from coprune.run.phase_events import BlockPruned, Phase, PhaseDone
from coprune.run.reuse import Reuse


@dataclass(frozen=True)
class Given:
    """Objects passed to a run in place of those that its recipe names."""

    loaded: Loaded | None = None
    """A model that is already loaded."""
    method: Method | None = None
    """A method object without a name in the recipe."""
    line: str | None = None
    """First line of output, if a default was chosen for the call."""

    @property
    def model(self) -> PreTrainedModel | None:
        """The model that is already loaded."""
        return None if self.loaded is None else self.loaded.model


NOTHING = Given()


@dataclass(frozen=True)
class Outcome:
    """The result of a run's walk."""

    results: list[MatrixResult]
    """Results of all pruned matrices of the source."""
    edits: Edits
    seconds: float
    trainings: Sequence[BlockTraining] = ()
    """Trainings of blocks, in order."""
    covered: Mapping[str, float] = field(default_factory=dict)
    """Share of the experts' score that each domain keeps, if experts were removed."""
    events: Sequence[AnyEvent] = ()
    """Events besides those of single matrices."""
    earlier: float = 0.0
    """Seconds that an earlier, stopped process spent on the reused matrices."""


@dataclass(eq=False)
class Run:
    """A run, or a step of one. Fields without a default are set by the stage that finds them."""

    recipe: Recipe
    given: Given
    reporter: Reporter
    processes: Processes = ALONE
    write: bool = False
    """Whether the run writes a run folder."""
    reuse: Reuse = field(default_factory=Reuse)
    taking: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered by the first process around its first write, after all checks; deletes the remains of an earlier run."""
    began: float = field(default_factory=time.perf_counter)
    phases: list[PhaseFacts] = field(default_factory=list)

    # Set when the model is opened, without the blocks' weights.
    solver: Solver = field(init=False)
    target: Target = field(init=False)
    loaded: Loaded = field(init=False)
    found: FoundModel = field(init=False)
    task: Task = field(init=False)
    samples: Samples[Any] | None = field(init=False)
    data: dict[str, Data] = field(init=False)
    domains: dict[str, Windows] = field(init=False)
    """Samples of every domain on which experts are scored."""
    bos: BosChoice | None = None
    """Where windows of text get a BOS token, once decided."""

    # Set by the proof of the walk, before anything slow.
    model: ProvenModel = field(init=False)
    reconstruction: Reconstruction | None = field(init=False)
    extras: Extras = field(init=False)
    change: Callable[[Run], Outcome] = field(init=False)
    """Walks over the blocks and changes them."""
    sized: RemovePart | None = None
    """The requested removal, with a target size resolved to shares."""
    write_gguf: Callable[[Path, Edits, Reporter], None] | None = None
    """Writes the result as a copy of the source without the removed parts, if both are GGUF files."""

    # Set by measuring and pruning.
    output: Output = field(init=False)
    dense: dict[str, Measured] = field(init=False)
    """Measurements of the dense model, by the name of the data."""
    outcome: Outcome = field(init=False)
    pruned: dict[str, Measured] = field(init=False)
    report: Report = field(init=False)

    @property
    def first(self) -> bool:
        """Whether this process reports and writes for all."""
        return self.processes.first

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.write and self.processes.first

    @property
    def removal(self) -> RemovePart:
        """The requested removal; a target size is resolved to shares once these are known."""
        return self.sized or self.recipe.remove

    @property
    def encoding(self) -> Encoding:
        """Encoding of the checkpoint, as requested and as the source allows."""
        if self.recipe.output.as_gguf:
            return Untouched()
        asked, stored = self.recipe.output.encoding, self.loaded.weights.stored_as
        return DENSE if stored is None or asked == "dense" else stored

    @property
    def looked_at(self) -> Samples[Any] | None:
        """Samples for trials: of the calibration text, or of the first domain."""
        return self.samples if self.samples is not None else next(iter(self.domains.values()), None)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of all calibration data; None without any."""
        own = {} if self.samples is None else {"": self.samples}
        found = [f"{name} {one.fingerprint}".strip() for name, one in {**own, **self.domains}.items()]
        return ", ".join(found) or None

    def source_digest(self) -> str:
        """Return the digest of the run's source model, in memory or in files. Raises BadInput if it does not exist."""
        asked, loaded = self.recipe.model, self.given.loaded
        if loaded is None:
            return source_digest(locate(asked.name, asked.cache_dir))
        backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
        beside = loaded.model.config, loaded.model.generation_config, loaded.tokenizer, backend and backend.to_str()
        return hashlib.sha256(f"{loaded.fingerprint(())} {beside}".encode()).hexdigest()[:32]

    def estimate(self) -> Estimate | None:
        """Bound the memory of the run, once its data are read; None for image models."""
        if (inputs := self.task.inputs.text) is None:
            return None
        processes = self.processes.size
        text = TextSizes.of(inputs.seqlen, self.samples, texts_of(self.data), processes)
        return bound_run(self.recipe, self.solver, text, self.loaded, self.found, processes)

    def activations(self, lists: int = 1) -> Activations:
        """Return an empty list of hidden states that keeps the recipe's memory limits. lists: number that share the limits.

        The rest is spilled to the run folder, whose disk is meant for large files, or to the temporary folder if there is none.
        """
        asked, folder = self.recipe.calibrate, self.recipe.run_folder
        limit = None if asked.activation_memory is None else int(asked.activation_memory * GIB / lists)
        room = device_room(self.loaded.device, asked.device_activation_memory)
        own = None if room is None else replace(room, nbytes=room.nbytes // lists)
        return Activations(limit=limit, folder=folder if folder.is_dir() else None, room=own)

    def finish_block(self, block: Block, outcome: BlockOutcome) -> None:
        """Apply the edits of a block, write it, and report it."""
        for edit in outcome.edits:
            edit.apply(block.module)
        self.output.write_block(block, outcome)
        self.reporter.tell(BlockPruned(block.name, tuple(outcome.results), outcome.training))

    def count_from_here(self, device: torch.device) -> None:
        """Start the clock of the first phase, and reset the peak of a device's memory."""
        reset_peak(device)
        self._device, self._phase_began = device, time.perf_counter()

    @property
    def phase(self) -> str:
        """The current phase, or the work after the last one."""
        return next((phase.value for phase in list(Phase)[len(self.phases) :]), "finish the report")

    def done(self, phase: Phase) -> None:
        """Record the end of a phase, and return free memory to the system."""
        return_free_memory()
        now, there = time.perf_counter(), device_memory(self._device)
        facts = PhaseFacts(
            name=phase.value,
            seconds=now - self._phase_began,
            resident_bytes=resident_memory(),
            device_bytes=None if there is None else there.allocated,
        )
        self._phase_began = now
        self.phases.append(facts)
        self.reporter.tell(PhaseDone(phase, facts))

    def finish(self, report: Report) -> Report:
        """Return the report with the run's total time, after `conclude`."""
        report = report.model_copy(update={"total_seconds": time.perf_counter() - self.began})
        self.conclude(report)
        return report

    def conclude(self, report: Report) -> None:
        """Finish the run folder, with the model's card; without a folder, write the card alone."""
        if self.writes:
            announce(self.recipe, report)
            finish_run_folder(self.recipe, report)
        elif self.first:
            write_card(report)
