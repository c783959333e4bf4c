"""`coprune inspect`: what a model is made of, what would be pruned, and how sparse it is already."""

from __future__ import annotations

from collections import defaultdict

from coprune.base.progress import NO_BAR, Reporter
from coprune.evaluation.tasks import task_for
from coprune.model.blocks import Block, find_blocks
from coprune.model.checkpoint.weights import Weights
from coprune.model.matrices import Chosen, Matrix, choose_matrices, find_matrices
from coprune.model.opened import Loaded, open_model
from coprune.model.walk.prove import prove_replay
from coprune.model.walk.proven import FoundModel
from coprune.model.walk.recording import record_batches
from coprune.pruning.allocation import Allocation, allocation_named
from coprune.pruning.allocation.plan import plan_targets
from coprune.recipe.pattern import Target
from coprune.recipe.recipe import Recipe
from coprune.run.checks import check_widths, prepare_solver
from coprune.run.look_at_dense import describe_targets


def inspect_lines(recipe: Recipe, every_matrix: bool, weights_too: bool, reporter: Reporter) -> list[str]:
    """Describe a model's blocks and matrices and what the recipe would prune, without changing anything.

    every_matrix: a line per matrix instead of one per kind; weights_too: read the weights to tell the present sparsity.
    Raises BadInput as a run with the recipe would.
    """
    _, target = prepare_solver(recipe)
    allocation = allocation_named(recipe.allocation)
    loaded = open_model(recipe.model, stream=True)
    blocks = find_blocks(loaded.model)
    chosen = choose_matrices(loaded.model, blocks, recipe.selection.include, recipe.selection.exclude)
    check_widths(chosen, target)
    found_model = FoundModel(loaded.weights, blocks, chosen)
    targets = _plan(recipe, loaded, found_model, allocation, target, reporter)
    wanted = {matrix.name for matrix in chosen.all()}
    zeros: dict[str, int] = {}
    matrices: list[Matrix] = []
    with reporter.bar("Reading weights", len(blocks)) as advance:
        for block in blocks:
            found = list(find_matrices(block.module, block.name))
            matrices += found
            if weights_too:
                zeros |= _count_zeros(loaded.weights, block.name, found)
            advance(1)
    matrices += chosen.outside
    lines = _matrix_lines(matrices, targets, zeros) if every_matrix else _kind_lines(matrices, wanted, zeros)
    if recipe.allocation.name != "uniform":
        lines += _allocation_lines(str(recipe.allocation), blocks, chosen, targets)
    pruned = sum(m.shape[0] * m.shape[1] for m in matrices if m.name in wanted)
    total = loaded.model.num_parameters()
    return [
        f"{loaded.source}: {loaded.model.config.model_type}, {total:,} parameters, {len(blocks)} blocks "
        f"({blocks[0].name} … {blocks[-1].name})",
        *lines,
        *(f"  leave  {layer}" for layer in chosen.left_out),
        f"would prune {len(wanted)} matrices with {pruned:,} weights ({pruned / total:.1%} of the model) to "
        f"{target.sparsity:.1%} ({target.pattern}), {pruned * target.sparsity / total:.1%} of the model",
    ]


def _count_zeros(weights: Weights, block: str, matrices: list[Matrix]) -> dict[str, int]:
    weights.acquire(block)
    zeros = {matrix.name: matrix.zeros() for matrix in matrices}
    weights.release(block)
    return zeros


def _plan(
    recipe: Recipe,
    loaded: Loaded,
    model: FoundModel,
    allocation: Allocation,
    target: Target,
    reporter: Reporter,
) -> dict[str, Target]:
    """What every chosen matrix would become, by name."""
    recording = None
    if allocation.statistic is not None:
        task = task_for(recipe, loaded)
        samples = task.calibration(True, reporter)
        assert samples is not None
        model = proven = prove_replay(model, task.probe(samples, {}))
        recording = record_batches(proven, task.batches(samples.tokens))
    with reporter.bar("Allocating sparsity", len(model.blocks)) if allocation.looks else NO_BAR as advance:
        return plan_targets(allocation, model, recording, target, advance=advance)


def _allocation_lines(name: str, blocks: list[Block], chosen: Chosen, targets: dict[str, Target]) -> list[str]:
    """Every block's sparsity, and that of its least and most pruned matrix."""
    lines = [f"allocation {name}: {describe_targets(chosen, targets)}"]
    places = [(block.name, own) for block, own in zip(blocks, chosen.blocks, strict=True)]
    for place, matrices in [*places, *((matrix.name, [matrix]) for matrix in chosen.outside)]:
        sizes = [matrix.shape[0] * matrix.shape[1] for matrix in matrices]
        own = [targets[matrix.name].sparsity for matrix in matrices]
        if own:
            mean = sum(s * size for s, size in zip(own, sizes, strict=True)) / sum(sizes)
            lines.append(f"  {place}  {mean:.1%}  ({min(own):.1%} … {max(own):.1%})")
    return lines


def _matrix_lines(matrices: list[Matrix], targets: dict[str, Target], zeros: dict[str, int]) -> list[str]:
    return [
        f"  {'prune' if m.name in targets else 'leave'}  {m.name}  {m.shape[0]} × {m.shape[1]}"
        f"{f'  to {targets[m.name]}' if m.name in targets else ''}{_sparsity([m], zeros)}"
        for m in matrices
    ]


def _kind_lines(matrices: list[Matrix], wanted: set[str], zeros: dict[str, int]) -> list[str]:
    """One line for all matrices that differ in the numbers in their names only."""
    kinds: dict[tuple[str, tuple[int, int], bool], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        parts = matrix.name.partition("[")[0].split(".")
        kind = ".".join("*" if part.isdigit() else part for part in parts) + (
            "[*]" if matrix.expert is not None else ""
        )
        kinds[kind, matrix.shape, matrix.name in wanted].append(matrix)
    return [
        f"  {'prune' if chosen else 'leave'}  {kind}  {shape[0]} × {shape[1]}  ({len(group)}){_sparsity(group, zeros)}"
        for (kind, shape, chosen), group in kinds.items()
    ]


def _sparsity(matrices: list[Matrix], zeros: dict[str, int]) -> str:
    counted = [m for m in matrices if m.name in zeros]
    if not counted:
        return ""
    size = sum(m.shape[0] * m.shape[1] for m in counted)
    return f"  {sum(zeros[m.name] for m in counted) / size:.2%} zero"
