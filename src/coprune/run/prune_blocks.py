"""The walk of one run: record its calibration batches, prune block by block, write what is finished.

What comes before and after, loading, measuring and saving, is in run.py.
"""

from __future__ import annotations

import time

from coprune.model.blocks import Block
from coprune.model.walk.activations import GIB, Activations
from coprune.model.walk.recording import Recording, record_batches
from coprune.model.walk.statistics import Gram
from coprune.model.walk.walk import Walk
from coprune.pruning.pruner import MatrixResult, Solving, SolvingAlone, prune_walk, reconstruct_block
from coprune.recipe.recipe import Recipe
from coprune.run.journal import Output
from coprune.run.look_at_dense import look_at_dense
from coprune.run.session import Session
from coprune.run.share import SharedOutput, SharedSolving


def prune_blocks(session: Session, output: Output | None) -> tuple[list[MatrixResult], float]:
    """Walk over the blocks and prune them, going on where an earlier run stopped; also the seconds that took."""
    recipe, loaded = session.recipe, session.loaded
    shared = SharedOutput(session.processes, output, loaded.weights)
    finished = shared.finished()
    if finished:
        session.reporter.say(f"{len(finished)} of {len(session.blocks)} blocks were finished by an earlier run.")
    started = time.perf_counter()
    target_of = look_at_dense(session, lambda: _record(session, dense=False))
    known = loaded.reuse.gathered(session, finished, lambda: _record(session, dense=False))
    with session.reporter.bar(f"Pruning with {recipe.method}", len(session.blocks)) as advance:
        # In `dense` propagation nothing has to run through blocks that are all known.
        recording = None if recipe.propagation == "dense" and known else _record_to_prune(session)
        walk = Walk(
            loaded.weights,
            session.blocks,
            session.chosen.blocks,
            session.solver.statistic,
            session.structure,
            recording,
            recipe.propagation,
            outside=session.chosen.outside,
            finished=finished,
            restore=shared.restore,
            known=known,
            cross=recipe.target == "dense",
            keep_inputs=session.reconstruction is not None,
            reduce=session.processes.reduce,
            agree=session.processes.positions,
            advance=advance,
        )

        def block_done(block: Block, results: list[MatrixResult]) -> list[MatrixResult]:
            if session.reconstruction is not None and recording is not None:
                results = reconstruct_block(session.reconstruction, block, recording, results)
            shared.write_block(block, results)
            facts = [result.model_dump(mode="json", exclude={"distributions"}) for result in results]
            session.reporter.event("block", block=block.name, matrices=facts)
            return results

        results = prune_walk(walk, session.solver, target_of, recipe.layer_error, block_done, _solving(session))
    earlier = [result for results_of_block in finished.values() for result in results_of_block]
    return earlier + results, time.perf_counter() - started


def _solving(session: Session) -> Solving:
    """Who prunes which matrix. In `sequential`, the matrices of a group are all that can be pruned at the same time."""
    if session.processes.size == 1:
        return SolvingAlone()
    sequential = session.recipe.propagation == "sequential"
    outside = [[matrix] for matrix in session.chosen.outside]
    stages = [*session.structure.groups, outside]
    if sequential:
        stages = [[group] for groups in stages for group in groups]
    return SharedSolving(session.processes, stages, sequential, gram=session.solver.statistic is Gram)


def _record_to_prune(session: Session) -> Recording | None:
    return _record(session, dense=session.solver.aim == "dense" or session.reconstruction is not None)


def _record(session: Session, dense: bool) -> Recording | None:
    """Record the calibration batches. dense: with the dense model's hidden states beside them, to aim at."""
    if session.samples is None:
        return None
    batches = session.task.batches(session.processes.share(session.samples.tokens))
    activations = activations_of(session.recipe, lists=2 if dense else 1)
    recording = record_batches(session.loaded.model, session.blocks, session.structure, batches, activations)
    if dense:
        recording.dense = recording.hidden.copy()
        if session.solver.aim != "dense" and session.reconstruction is not None:
            recording.aims = session.reconstruction.batches_used(len(batches))
    return recording


def activations_of(recipe: Recipe, lists: int = 1) -> Activations:
    """An empty list of hidden states within the recipe's limit, or one of several that share the limit.

    What is beyond goes beside the run folder, whose disk is meant for large files, or to the folder for temporary ones.
    """
    limit = None if recipe.activation_memory is None else int(recipe.activation_memory * GIB / lists)
    return Activations(limit=limit, folder=recipe.run_folder if recipe.run_folder.is_dir() else None)
