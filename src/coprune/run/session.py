"""What a run gathers before it changes anything: first without the blocks' weights, then with the proof of the walk."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace

from coprune.base.memory import return_free_memory
from coprune.base.processes import Processes
from coprune.base.progress import Reporter
from coprune.data import EvaluationText, Windows
from coprune.evaluation.tasks import Data, Samples, Task, TextTask, task_for
from coprune.model.blocks import Block, find_blocks
from coprune.model.matrices import Chosen, choose_matrices
from coprune.model.opened import Loaded, open_model, streams
from coprune.model.walk.prove import Structure, prove_replay
from coprune.pruning.allocation import allocation_named
from coprune.pruning.pruner import Solver
from coprune.pruning.refine.reconstruct import Reconstruction
from coprune.recipe.pattern import Target
from coprune.recipe.recipe import Recipe
from coprune.run.checks import check_processes, check_widths, prepare_reconstruction, prepare_solver
from coprune.run.estimate.estimate import Estimate
from coprune.run.estimate.workload import estimate_run


@dataclass
class Opened:
    """A run that has read its data, and nothing of its blocks."""

    recipe: Recipe
    solver: Solver
    target: Target
    loaded: Loaded
    blocks: list[Block]
    chosen: Chosen
    task: Task
    samples: Samples | None
    data: dict[str, Data]
    reporter: Reporter
    processes: Processes
    started: float

    def estimate(self) -> Estimate | None:
        """What the run will take; None for models of images."""
        if not isinstance(self.task, TextTask):
            return None
        texts = [text for text in self.data.values() if isinstance(text, EvaluationText)]
        windows = self.samples if isinstance(self.samples, Windows) else None
        found = estimate_run(
            self.recipe,
            self.solver,
            self.target,
            self.loaded,
            self.blocks,
            self.chosen,
            self.task.seqlen,
            windows,
            texts,
            self.processes,
        )
        return replace(found, seconds=found.seconds + time.perf_counter() - self.started)


def open_run(recipe: Recipe, loaded: Loaded | None, reporter: Reporter, processes: Processes) -> Opened:
    """Check everything that can be checked without the blocks, cheap things first, and read the data."""
    started = time.perf_counter()
    solver, target = prepare_solver(recipe)
    allocation_named(recipe.allocation)
    check_processes(recipe, processes.size)
    if loaded is None:
        reporter.say(f"Loading {recipe.model}")
        loaded = open_model(recipe, stream=streams(recipe))
    blocks = find_blocks(loaded.model)
    chosen = choose_matrices(loaded.model, blocks, recipe.include, recipe.exclude)
    check_widths(chosen, target)
    for left_out in [*chosen.left_out, *loaded.left_out]:
        reporter.say(f"Left alone: {left_out}.")
    task = task_for(recipe, loaded)
    samples = task.calibration(solver, reporter)
    data = task.evaluation(reporter)
    return_free_memory()  # tokenising a corpus takes some hundred bytes a token for a while
    return Opened(recipe, solver, target, loaded, blocks, chosen, task, samples, data, reporter, processes, started)


@dataclass
class Session(Opened):
    """All that a run has gathered before it changes anything."""

    structure: Structure
    reconstruction: Reconstruction | None


def prepare_run(recipe: Recipe, loaded: Loaded | None, reporter: Reporter, processes: Processes) -> Session:
    """Check everything that can be checked, say what the run will take, and prove that the model can be walked."""
    opened = open_run(recipe, loaded, reporter, processes)
    if processes.first and (estimate := opened.loaded.reuse.estimate(opened.estimate)) is not None:
        reporter.say(estimate.line())
        if recipe.check_memory:
            estimate.require()
    probe = opened.task.probe(opened.samples, opened.data)
    model, weights = opened.loaded.model, opened.loaded.weights
    structure = prove_replay(model, weights, opened.blocks, opened.chosen.blocks, probe)
    gathered = {field.name: getattr(opened, field.name) for field in fields(opened)}
    return Session(**gathered, structure=structure, reconstruction=prepare_reconstruction(recipe))
