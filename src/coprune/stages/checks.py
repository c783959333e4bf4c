"""Checks of a run before anything slow starts: method, target, matrices, folders."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable

import torch

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import is_unfinished, require_apart, require_own_name, require_usable
from coprune.base.words import LeaveOut, Set, Setting
from coprune.model.edits import is_coprunes
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
from coprune.removal.unit_scores import score_named, spreading_named
from coprune.report.links import PAGE_FILE
from coprune.report.run_folder import RECIPE_FILE, REPORT_FILE, has_source
from coprune.report.schema import DISTRIBUTIONS_FILE, Report

LARGE_GROUP = 64
"""Group size above which a method is tried on one group."""
LARGEST_GROUP = 1024
"""Larger ones are not tried, which takes their cube: hardly any width can be divided by them, and that is told at once."""


def prepare_solver(recipe: Recipe, given: Method | None = None) -> tuple[Solver, Target]:
    """Resolve the method, the refinements and the target, and try them on a tiny matrix.

    Args:
        recipe: the settings.
        given: the method, if passed as an object.

    Raises:
        BadInput: a name or option is unknown, or the combination is not possible.
    """
    if recipe.cuts_and_prunes:  # what is left gets zeros, whose turn comes when the cut is done
        prepare_solver(recipe.model_copy(update={"remove": RemovePart()}), given)
    if recipe.remove.parts:
        _check_names(recipe)
        # Removal needs Gram matrices, as SparseGPT does, and sets nothing to zero.
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
    if recipe.remove.spreads or not recipe.cuts_and_prunes:  # or else the allocation is of the zeros
        spreading_named(recipe.prune.allocation)


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
    """Check a step whose turn comes late.

    Args:
        removed: kinds of parts that the whole run removes, after which some blocks have other numbers.
        recipe: the step's.
        method: where it was handed over.

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
    """Raise BadInput for what several processes cannot do together."""
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


def prepare_folders(recipe: Recipe, begun: bool = False) -> None:
    """Refuse to write where something is already. A run folder without a report is an unfinished run's and is reused.

    begun: whether the folder for the model may have the run's own already.
    """
    run_folder = recipe.run_folder
    require_usable(run_folder, "save")
    another = ("name another run folder with ", Setting("save"))
    if run_folder.exists() and not run_folder.is_dir():
        raise BadInput(f"{run_folder} is a file", field="save", value=run_folder, fix=another)
    if recipe.output.overwrite:
        _refuse_own_source(recipe)
    elif (run_folder / REPORT_FILE).exists():
        fix = (*another, ", or replace it with ", Set("overwrite", True))
        raise BadInput(f"{run_folder} already holds {_which(recipe)}", field="save", value=run_folder, fix=fix)
    # A run that was refused or failed early left no more than its logs.
    logs = {run_folder / "tensorboard", *([recipe.output.log_json] if recipe.output.log_json else [])}
    holds = {path for path in run_folder.glob("*") if not is_unfinished(path)} - logs
    if holds and not (run_folder / RECIPE_FILE).exists():
        raise BadInput(
            f"{run_folder} already holds something other than a run", field="save", value=run_folder, fix=another
        )
    target = recipe.output.model
    if target is None or begun:
        return
    require_own_name(target, "save_model")
    require_apart(run_folder, target, OWN_FOLDERS)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        mine = is_coprunes(target)
        if not (mine and recipe.output.overwrite):
            replace = (", or replace that model with ", Set("overwrite", True)) if mine else ()
            fix = ("name another folder with ", Setting("save_model"), *replace)
            raise BadInput(f"{target} already exists and is not empty", field="save_model", value=target, fix=fix)


def _which(recipe: Recipe) -> str:
    """Return what a run folder with a report holds, for people."""
    try:
        report = Report.read(recipe.run_folder / REPORT_FILE)
    except BadInput:
        return "a finished run"
    run = "a finished run" if report.recipe.gives_as(recipe) else "another run"
    return run if has_source(report, recipe) else f"{run} on other weights"


def check_widths(matrices: Iterable[Matrix], target: Target) -> None:
    """Raise BadInput where the pattern does not divide the inputs of a matrix."""
    for matrix in matrices:
        if not target.pattern.fits(matrix.shape[1]):
            raise BadInput(
                f"the pattern {target.pattern} does not divide the {matrix.shape[1]} inputs of {matrix.name}",
                field="pattern",
                value=str(target.pattern),
                fix=("choose another pattern, or leave it out with ", Set("exclude", matrix.name)),
            )


def check_allocation(recipe: Recipe, model: FoundModel, target: Target) -> None:
    """Raise BadInput where the sparsity cannot be spread as asked, as far as no block has to be looked at for that."""
    if recipe.remove.parts:
        return
    allocation = allocation_named(recipe.prune.allocation)
    # Whether limits leave room does not depend on what is measured. What experts there are shows when the model runs.
    if not allocation.looks or all(matrix.expert is None for matrix in model.chosen.all()):
        allocation.allocate(units_of(model.chosen, model.names, shared=not allocation.looks), {}, target)


def needs_inputs(recipe: Recipe, solver: Solver) -> bool:
    """Return whether the calibration data decides the result: by a statistic, a training, an allocation, a reordering."""
    if solver.statistic is not None or recipe.prune.reconstruct.steps > 0 or recipe.prune.reshapes:
        return True
    return allocation_named(recipe.prune.allocation).statistic is not None


_FILES = (f".{REPORT_FILE}", PAGE_FILE, DISTRIBUTIONS_FILE, "log_*.txt")
OWN_FOLDERS = ("trim", "remove", "prune", "train", "vocabulary")
"""What a run keeps in its folder: the steps of a run of several, and the trials of a cut vocabulary."""


def _refuse_own_source(recipe: Recipe) -> None:
    """Raise BadInput where a run would remove the model that it reads."""
    source = expand_home(recipe.model.name)
    if not source.exists():
        return
    gone = [recipe.run_folder / name for name in OWN_FOLDERS]
    gone += [recipe.output.model] if recipe.output.model is not None else []
    if any(source.resolve().is_relative_to(folder.resolve()) for folder in gone):
        fix = ("name other folders with ", Setting("save"), " and ", Setting("save_model"))
        raise BadInput(f"the run would replace {source}, which it reads", field="overwrite", value=True, fix=fix)


def replace_earlier(recipe: Recipe) -> None:
    """Remove what an earlier run left where this one writes. What an unfinished run left stays, to go on from."""
    run, model = recipe.run_folder, recipe.output.model
    finished = (run / REPORT_FILE).is_file()
    if finished:
        for pattern in _FILES:
            for file in run.glob(pattern):
                file.unlink()
        for name in OWN_FOLDERS:
            shutil.rmtree(run / name, ignore_errors=True)
    if model is not None and is_coprunes(model):
        shutil.rmtree(model)
    if finished:
        (run / REPORT_FILE).unlink()  # last, since it says that the rest is of a finished run
