"""Pruning: measure the dense model once, then prune and write block by block."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from coprune.base.devices import memory_within
from coprune.base.memory import freed_memory_kept
from coprune.base.progress import NO_BAR
from coprune.base.words import per_cent
from coprune.model.blocks import Block
from coprune.model.checkpoint.formats import Rounding
from coprune.model.edit import Edit, FillZeros
from coprune.model.matrices import Matrix
from coprune.model.matrix_choice import Chosen
from coprune.model.walk.block_events import NO_PAST, BlockDone, Past
from coprune.model.walk.recording import Dense, Recording
from coprune.model.walk.statistics import Gram
from coprune.model.walk.walk import Walk
from coprune.pruning.allocation import allocation_named
from coprune.pruning.allocation.allocation_plan import plan_targets
from coprune.pruning.block_training import reconstruct_block
from coprune.pruning.permutation import permute_model
from coprune.pruning.pruner import MatrixResult, Solving, prune_walk
from coprune.pruning.rotation import rotate_model
from coprune.recipe.pattern import Grid, Target
from coprune.recipe.recipe import Recipe
from coprune.recipe.structure import RemovePart
from coprune.report.run_events import AnyEvent, IdleTrainings
from coprune.run.calibrating import (
    counted_batches,
    first_counted,
    moves_of,
    record_calibration,
    record_counted,
    record_to_prune,
)
from coprune.run.context import Outcome, Run
from coprune.run.kept_statistics import kept_statistics
from coprune.run.output import BlockOutcome
from coprune.run.result import Result
from coprune.run.shared_weights import DenseCopies, prune_shared
from coprune.run.step import Left
from coprune.stages.checks import check_widths, prepare_solver
from coprune.stages.run_stages import run_stages
from coprune.steps.recipe_step import UNIFORM, StepOfRecipe, allocates_units, without_training

_FEW_TOKENS = 2048
"""Tokens for norms of inputs and Gram matrices of single heads, which are small enough for so few."""


class Prune(StepOfRecipe):
    """Sets weights to zero."""

    name = "prune"

    @classmethod
    def is_asked(cls, recipe: Recipe) -> bool:
        return recipe.sets_zeros

    @classmethod
    def part_of(cls, recipe: Recipe) -> Recipe:
        own = without_training(recipe).model_copy(update={"remove": RemovePart()})
        if not recipe.remove.kinds:
            return own
        # Conditions are judged on the whole run, which knows the dense model's answers; here answers are only generated.
        require = "loops>=0" if own.evaluate.answers.conditions else None
        allocation = UNIFORM if allocates_units(recipe) else recipe.prune.allocation
        return own.replaced(allocation=allocation, evaluate_dense=False, prompt="", require=require)

    @classmethod
    def told(cls, recipe: Recipe, chosen: Chosen, blocks: Sequence[Block]) -> str:
        _, target = prepare_solver(recipe)
        check_widths((matrix for matrix in chosen.all() if matrix.expert is None), target)
        weights = sum(math.prod(matrix.shape) for matrix in chosen.all())
        zeros = f"{per_cent(target.sparsity)} of {weights:,} weights in {len(list(chosen.all()))} matrices"
        return f"{zeros} become zero ({recipe.prune.pattern}), by {recipe.prune.method.name}"

    def do(self, run: Run) -> Left:
        return Left.of(prune(run))


def prune(run: Run) -> Result:
    """Set weights of a model to zero.

    Raises:
        BadInput, NumericalError, UnsupportedModel, VerificationError: as `coprune.prune`.
    """
    return run_stages(run, _plan)


def _plan(run: Run) -> None:
    run.change = prune_blocks


@freed_memory_kept()
def prune_blocks(run: Run) -> Outcome:
    """Walk over the blocks and prune them, resuming an earlier run."""
    model, recipe, reporter, output = run.model, run.recipe, run.reporter, run.output
    finished = output.finished()
    if finished:
        reporter.say(f"{len(finished)} of {len(model.blocks)} blocks were finished by an earlier run.")
    events: list[AnyEvent] = [*output.changes] if finished else []
    for event in events:
        reporter.say(f"{event.line()}.")
    started = time.perf_counter()
    rounded: list[Rounding] = []
    target_of = _on_grids(run, _look_at_dense(run), rounded)
    known = kept_statistics(run, finished, lambda: record_calibration(run))
    moves, shared, dense = moves_of(run), list[MatrixResult](), NO_PAST.dense
    if model.chosen.several:
        if isinstance(moves, Dense) or run.reconstruction is not None:
            dense = DenseCopies(model).within
        shared = prune_shared(run, target_of, rounded)
    with reporter.bar(f"Pruning with {recipe.prune.method.name}", len(model.blocks)) as advance:
        # In `dense` propagation nothing has to run through blocks that are all known.
        recording = None if recipe.calibrate.propagation == "dense" and known else record_to_prune(run)
        walk = Walk(
            model,
            recording,
            run.solver.statistic,
            moves,
            Past(finished, output.restore, known, dense),
            run.processes,
            advance,
        )
        with output.settled(), memory_within(lambda: walk.at):
            output.write_skipped()
            results = _prune(run, walk, target_of, rounded)
    earlier = [result for outcome in finished.values() for result in outcome.results]
    trainings = output.trainings
    if (idle := IdleTrainings.of(trainings)) is not None:
        reporter.say(f"{idle.line()}.")
        events.append(idle)
    outside = {matrix.name for matrix in model.chosen.outside}
    rest = FillZeros(masks=_masks([*shared, *(result for result in results if result.name in outside)]))
    return Outcome(
        shared + earlier + results,
        output.edits(rest),
        time.perf_counter() - started,
        trainings,
        events=events,
        earlier=sum(result.seconds for result in earlier),
    )


def _prune(run: Run, walk: Walk, target_of: Callable[[Matrix], Target], rounded: list[Rounding]) -> list[MatrixResult]:
    """Prune the matrices of the walk; train each finished block if requested, and write it.

    rounded: receives the rounding done meanwhile.
    """

    def block_done(done: BlockDone, results: list[MatrixResult]) -> list[MatrixResult]:
        training = None
        if run.reconstruction is not None and walk.recording is not None:
            fixed = run.model.chosen.shared
            results, training = reconstruct_block(
                run.reconstruction, done, walk.recording, results, fixed, run.output.trainings
            )
        own = sum((part for parts in run.processes.gather(rounded) for part in parts), Rounding())
        rounded.clear()
        run.finish_block(done.block, BlockOutcome(results, edits_of(results), training, own))
        return results

    sequential = run.recipe.calibrate.propagation == "sequential"
    stages = [*run.model.structure.groups, [[matrix] for matrix in run.model.chosen.outside]]
    if sequential:  # only matrices with the same input can be pruned at the same time
        stages = [[group] for groups in stages for group in groups]
    return prune_walk(
        walk,
        run.solver,
        target_of,
        run.recipe.evaluate.layer_error,
        block_done,
        Solving(run.processes, stages, sequential, gram=run.solver.statistic is Gram),
    )


def edits_of(results: Sequence[MatrixResult]) -> list[Edit]:
    """Return the edits of a block with pruned matrices."""
    return [FillZeros(masks=_masks(results))]


def _masks(results: Iterable[MatrixResult]) -> dict[str, str]:
    return {result.name: result.mask_checksum for result in results}


def _look_at_dense(run: Run) -> Callable[[Matrix], Target]:
    """Permute channels, rotate values and allocate sparsity as the recipe says; return the target of each matrix.

    All processes of a run call this together. Raises BadInput, NumericalError.
    """
    model, recipe, reporter, processes = run.model, run.recipe, run.reporter, run.processes
    # Permutation comes first, since values are rotated for the resulting groups of inputs.
    if recipe.prune.permute:
        recording, pattern = _record_few(run, _FEW_TOKENS), run.target.pattern
        with reporter.bar("Permuting channels", len(model.blocks)) as advance:
            permuted = permute_model(model, recording, run.solver.method, pattern, processes, advance)
        reporter.say(permuted.describe())
    if recipe.prune.rotate:
        recording = _record_few(run, _FEW_TOKENS)
        with reporter.bar("Rotating values", len(model.blocks)) as advance:
            rotated = rotate_model(model, recording, run.target, processes, advance)
        reporter.say(rotated.describe())
    allocation, inputs = allocation_named(recipe.prune.allocation), None
    if allocation.statistic is not None:
        inputs = _record_few(run, allocation.first) if allocation.first else record_calibration(run)
    bar = reporter.bar("Allocating sparsity", len(model.blocks)) if allocation.measures else NO_BAR
    with bar as advance:
        targets = plan_targets(allocation, model, inputs, run.target, processes, advance)
    targets = processes.from_first(lambda: targets)
    if recipe.prune.allocation.name != "uniform":
        sizes = {matrix.name: matrix.shape[0] * matrix.shape[1] for matrix in model.chosen.all()}
        overall = sum(targets[name].sparsity * size for name, size in sizes.items()) / sum(sizes.values())
        sparsities = [target.sparsity for target in targets.values()]
        spread = f"from {per_cent(min(sparsities))} to {per_cent(max(sparsities))} sparse, {per_cent(overall)} in all"
        reporter.say(f"Allocation {recipe.prune.allocation}: matrices {spread}.")
    return lambda matrix: targets[matrix.name]


def _on_grids(run: Run, target_of: Callable[[Matrix], Target], rounded: list[Rounding]) -> Callable[[Matrix], Target]:
    """Restrict targets to values that the source's encoding can represent under its scales.

    rounded: collects the rounding.
    """
    weights = run.model.weights
    if run.encoding is not weights.stored_as or run.solver.statistic is not Gram or run.recipe.prune.reshapes:
        return target_of

    def counted(grid: Grid) -> Grid:
        def nearest(values: Tensor, columns: slice) -> Tensor:
            found = grid(values, columns)
            rounded[:] = [sum(rounded, Rounding.between(values, found))]
            return found

        return nearest

    def target_on_grid(matrix: Matrix) -> Target:
        as_stored = matrix.expert is None and matrix.input_dim == 1
        grid = weights.grid_of(matrix.parameter) if as_stored else None
        return target_of(matrix) if grid is None else replace(target_of(matrix), grid=counted(grid))

    return target_on_grid


def _record_few(run: Run, tokens: int) -> Recording:
    """Record the first calibration batches that hold at least `tokens` tokens."""
    assert run.samples is not None
    batches = counted_batches(run.task, run.recipe, run.samples, run.processes)
    return record_counted(run.model, first_counted(batches, tokens))
