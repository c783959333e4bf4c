"""Checks of a run before anything slow starts: method, target, matrices, folders."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from coprune.base.errors import BadInput
from coprune.base.words import LeaveOut, Set
from coprune.model.matrices import Matrix
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.model.walk.model_structure import FoundModel
from coprune.pruning.allocation import allocation_named
from coprune.pruning.allocation.allocation import units_of
from coprune.pruning.allocation.by_file import ByFile
from coprune.pruning.methods import METHODS, Method, method_named
from coprune.pruning.pruner import Solver
from coprune.pruning.refine import refinement_named
from coprune.pruning.refine.reconstruct import Reconstruction
from coprune.recipe.choice import Choice
from coprune.recipe.parts import refuse_numbers
from coprune.recipe.pattern import Target, parse_pattern
from coprune.recipe.recipe import Recipe
from coprune.recipe.structure import RemovePart
from coprune.removal.block_scores import block_score_named
from coprune.removal.expert_scores import expert_score_named
from coprune.removal.unit_scores import score_named, unit_allocation_named

LARGE_GROUP = 64
"""Group size above which a method is tried on one group."""
LARGEST_GROUP = 1024
"""Group size above which no trial is made: its cost is cubic, and the check of widths refuses nearly all such groups."""


def prepare_solver(recipe: Recipe, given: Method | None = None) -> tuple[Solver, Target]:
    """Resolve the method, the refinements and the target, and try them on a tiny matrix.

    Args:
        recipe: the settings.
        given: the method, if passed as an object.

    Raises:
        BadInput: a name or option is unknown, or the combination is not possible.
    """
    if recipe.cuts_and_prunes:  # check the pruning that follows the removal, too
        prepare_solver(recipe.model_copy(update={"remove": RemovePart()}), given)
    if recipe.remove.parts:
        _check_names(recipe)
        # Removal needs the same Gram matrices as SparseGPT, but sets no zeros.
        return Solver(METHODS["sparsegpt"]), Target(parse_pattern("unstructured"), 0.0)
    method = given if given is not None else _method_of(recipe.prune.method)
    refinements = tuple(refinement_named(asked) for asked in recipe.prune.refine)
    solver = Solver(method, refinements)
    target = Target(parse_pattern(recipe.prune.pattern), recipe.prune.ratio)
    # A trial costs milliseconds and finds errors that would otherwise stop the run at its first matrix.
    group = target.multiple if target.multiple > 1 else 4
    if group > LARGEST_GROUP:
        return solver, target
    width = 2 * group if group <= LARGE_GROUP else group
    generator = torch.Generator().manual_seed(0)
    inputs = Inputs(solver.statistic(width) if solver.statistic is not None else None, InputSample(width, 1))
    inputs.update(torch.randn(min(4 * width, 4 * LARGE_GROUP), width, generator=generator))
    solver.solve(torch.randn(4, width, generator=generator), inputs, target)
    return solver, target


def _check_names(recipe: Recipe) -> None:
    """Check the scores and the allocation of a recipe. Raises BadInput for an unknown name or option."""
    score_named(recipe.remove.score_of("units"))
    block_score_named(recipe.remove.score_of("blocks"))
    expert_score_named(recipe.remove.score_of("experts"))
    if recipe.remove.removes_units or not recipe.cuts_and_prunes:  # otherwise the allocation is for the zeros
        unit_allocation_named(recipe.prune.allocation)


def _method_of(asked: Choice) -> Method:
    if asked.is_given:
        raise BadInput(
            f"the method {asked.name} is a Python object, which a recipe cannot hold",
            field="method",
            value=asked.name,
            fix="pass it again, or name another method",
        )
    return method_named(asked.name, asked.options)


def check_zeros_after(removed: Collection[str], recipe: Recipe, method: Method | None) -> None:
    """Check a later step of a run before the first one starts.

    Args:
        removed: kinds of parts that the run removes; without some blocks, the others are renumbered.
        recipe: that of the step.
        method: the method, if passed as an object.

    Raises:
        BadInput: a name or option is unknown, or the combination is not possible.
    """
    prepare_solver(recipe, method)
    if not recipe.remove.parts:
        asked = allocation_named(recipe.prune.allocation)
        globs = [glob for glob, _ in asked.entries] if isinstance(asked, ByFile) else []
        if (wrong := refuse_numbers(globs, "allocation", removed)) is not None:
            raise wrong


def prepare_reconstruction(recipe: Recipe) -> Reconstruction | None:
    """Return how every pruned block is trained; None if the recipe asks for no training."""
    asked = recipe.prune.reconstruct
    if asked.steps == 0:
        return None
    return Reconstruction(
        steps=asked.steps,
        tokens=asked.tokens,
        learning_rate=asked.learning_rate,
        dtype=asked.dtype,
        seed=recipe.calibrate.seed,
    )


def check_processes(recipe: Recipe, size: int) -> None:
    """Raise BadInput for settings that several processes do not support."""
    if size > 1 and recipe.prune.reconstruct.steps:
        raise BadInput(
            "reconstruct trains on all samples in one process only",
            field="reconstruct",
            value=recipe.prune.reconstruct.steps,
            fix=(LeaveOut("reconstruct"), ", or run without torchrun"),
        )
    samples = recipe.calibrate.samples
    if size > samples:
        raise BadInput(
            f"{size} processes cannot share {samples} samples",
            field="nsamples",
            value=samples,
            fix="use fewer processes or more samples",
        )


def check_widths(matrices: Iterable[Matrix], target: Target) -> None:
    """Raise BadInput if the pattern does not divide the inputs of a matrix."""
    for matrix in matrices:
        if not target.pattern.fits(matrix.shape[1]):
            raise BadInput(
                f"the pattern {target.pattern} does not divide the {matrix.shape[1]} inputs of {matrix.name}",
                field="pattern",
                value=str(target.pattern),
                fix=("choose another pattern, or leave it out with ", Set("exclude", matrix.name)),
            )


def check_allocation(recipe: Recipe, model: FoundModel, target: Target) -> None:
    """Raise BadInput if the sparsity cannot be allocated as requested, as far as this is known before measuring."""
    if recipe.remove.parts:
        return
    allocation = allocation_named(recipe.prune.allocation)
    # Limits can be checked without measurements, but experts are only known once the model runs.
    if not allocation.measures or all(matrix.expert is None for matrix in model.chosen.all()):
        allocation.allocate(units_of(model.chosen, model.names, shared=not allocation.measures), {}, target)


def needs_inputs(recipe: Recipe, solver: Solver) -> bool:
    """Return whether the result depends on calibration data: by statistics, training, allocation or permutation."""
    if solver.statistic is not None or recipe.prune.reconstruct.steps > 0 or recipe.prune.reshapes:
        return True
    return allocation_named(recipe.prune.allocation).statistic is not None
