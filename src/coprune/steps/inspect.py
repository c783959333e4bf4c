"""Inspection of a model: its blocks and matrices, what would be pruned, and what is zero already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.progress import NO_BAR, Reporter
from coprune.base.words import LeaveOut, Sheet, Shown, per_cent
from coprune.data.keyword_arguments import PruneArguments
from coprune.evaluation.tasks import task_for
from coprune.model.bare_configuration import Imagined
from coprune.model.blocks import Block, find_blocks
from coprune.model.checkpoint.load import prepared
from coprune.model.checkpoint.weights import Weights
from coprune.model.loaded_model import Loaded, open_model, open_without_weights
from coprune.model.matrices import Matrix, find_matrices
from coprune.model.matrix_choice import choose_matrices
from coprune.model.transformers_private import Processor
from coprune.model.walk.model_structure import FoundModel
from coprune.model.walk.prove import prove_replay
from coprune.pruning.allocation import allocation_named
from coprune.pruning.allocation.allocation_plan import plan_targets
from coprune.recipe.flat import layered
from coprune.recipe.pattern import Target
from coprune.recipe.recipe import Recipe
from coprune.recipe.structure import WHOLE_MODEL
from coprune.run.calibrating import counted_batches, first_counted, record_counted
from coprune.run.context import NOTHING, Given
from coprune.run.read_call import read_call
from coprune.stages.checks import check_widths, prepare_solver
from coprune.steps.saved_size import parameters_gone

PARTS = ("vocabulary=0.5", "experts=0.25", "channels=0.25", "heads=0.25", "blocks=0.2")
"""Removals whose savings are shown."""
FEW_SAMPLES = 16
"""Number of samples that suffice to show an allocation."""


def inspect(
    model: str | Path | PreTrainedModel,
    *,
    weights: bool = True,
    processor: Processor | None = None,
    quiet: bool = False,
    **settings: Unpack[PruneArguments],
) -> Inspection:
    """List a model's blocks and matrices with their targets and present sparsity, without changing the model.

    Args:
        model: as in `coprune.prune`; a folder's blocks stay on disk until they are read. A folder with only config.json
            is enough, and no weights are fetched for a Hub id.
        weights: read local weights to report their sparsity.
        processor: the tokenizer or image processor of a model in memory, for an allocation that needs data.
        quiet: no progress bars and lines on standard error.
        settings: as in `coprune.prune`: the target (`pattern`, `sparsity`, `include`, `exclude`, `allocation`), and the data
            for an allocation that needs some (16 samples).

    Returns:
        Blocks and matrices with their shapes, targets and zeros.

    Raises:
        BadInput: a setting is invalid.
        UnsupportedModel: the model has no blocks.
    """
    recipe, given = read_call(model, None, None, processor, layered({"nsamples": FEW_SAMPLES}, settings))
    with prepared(given.model):
        return inspect_recipe(recipe, Reporter(quiet), weights, given)


def inspect_recipe(recipe: Recipe, reporter: Reporter, weights: bool = True, given: Given = NOTHING) -> Inspection:
    """List the matrices that a recipe would prune. Raises the BadInput that a run would raise."""
    if recipe.remove.parts:
        cause = "inspect shows where zeros would be, not which parts would be removed"
        raise BadInput(cause, field="remove", fix=LeaveOut("remove"))
    _, target = prepare_solver(recipe)
    allocation_named(recipe.prune.allocation)
    with reporter.libraries():
        loaded = given.loaded or _open(recipe, reporter)
    if isinstance(loaded.weights, Imagined):
        weights = False
    blocks = find_blocks(loaded.model)
    chosen = choose_matrices(loaded.model, blocks, recipe.prune.include, recipe.prune.exclude)
    check_widths(chosen.all(), target)
    targets = _plan(recipe, loaded, FoundModel(loaded.weights, blocks, chosen), target, reporter)
    found: list[InspectedMatrix] = []
    again = {matrix.name for uses in chosen.several for matrix in uses[1:]}
    with reporter.bar("Reading weights", len(blocks)) as advance:
        for block in blocks:
            matrices = [one for one in find_matrices(block.module, block.name) if one.name not in again]
            zeros = _count_zeros(loaded.weights, block.name, matrices) if weights else {}
            found += _inspected(matrices, block.name, targets, zeros)
            advance(1)
    kinds = {matrix.kind for matrix in found}
    return Inspection(
        model=loaded.source,
        model_type=loaded.model.config.model_type,
        parameters=loaded.model.num_parameters(),
        blocks=tuple(block.name for block in blocks),
        matrices=(*found, *_inspected(chosen.outside, None, targets, {})),
        left_out=tuple(str(layers) for layers in chosen.left_out if layers.kind not in kinds),
        target=target,
        allocation=str(recipe.prune.allocation),
        stored=() if loaded.weights.stored_as is None else tuple(loaded.weights.stored_as.lines()),
        removable=_removable(loaded, blocks),
    )


def _removable(loaded: Loaded, blocks: Sequence[Block]) -> dict[str, int]:
    if loaded.task != "text":
        return {}
    gone = {part: parameters_gone(part, loaded, blocks) for part in PARTS}
    return {part: count for part, count in gone.items() if count}


def _open(recipe: Recipe, reporter: Reporter) -> Loaded:
    """Open the model, from its configuration alone if the weights are not local and nothing needs them."""
    allocation = allocation_named(recipe.prune.allocation)
    if (loaded := open_without_weights(recipe.model)) is None:
        return open_model(recipe.model, stream=recipe.prune.allocation.name not in WHOLE_MODEL)
    if allocation.measures:
        raise BadInput(
            f"allocation {recipe.prune.allocation} needs weights, and {loaded.source} is only a configuration",
            field="allocation",
            fix=LeaveOut("allocation"),
        )
    reporter.say(f"{loaded.source} is only a configuration, so present zeros are unknown.")
    return loaded


def _inspected(
    matrices: Iterable[Matrix], block: str | None, targets: dict[str, Target], zeros: dict[str, int]
) -> list[InspectedMatrix]:
    return [
        InspectedMatrix(matrix.name, block, matrix.shape, targets.get(matrix.name), zeros.get(matrix.name))
        for matrix in matrices
    ]


def _count_zeros(weights: Weights, block: str, matrices: list[Matrix]) -> dict[str, int]:
    weights.acquire(block)
    zeros = {matrix.name: matrix.zeros() for matrix in matrices}
    weights.release(block)
    return zeros


def _plan(recipe: Recipe, loaded: Loaded, model: FoundModel, target: Target, reporter: Reporter) -> dict[str, Target]:
    """Return the target of every chosen matrix, by name."""
    recording, allocation = None, allocation_named(recipe.prune.allocation)
    if allocation.statistic is not None:
        task = task_for(recipe, loaded)
        samples = task.inputs.calibration(True, reporter)
        assert samples is not None
        model = proven = prove_replay(model, task.inputs.probe(samples, {}))
        recording = record_counted(proven, first_counted(counted_batches(task, recipe, samples), allocation.first))
    with reporter.bar("Allocating sparsity", len(model.blocks)) if allocation.measures else NO_BAR as advance:
        return plan_targets(allocation, model, recording, target, advance=advance)


@dataclass(frozen=True)
class InspectedMatrix:
    """A matrix of a model."""

    name: str
    block: str | None
    """Name of its block; None outside the blocks."""
    shape: tuple[int, int]
    """(out, in)"""
    target: Target | None
    """Target of the matrix; None if it would not be pruned."""
    zeros: int | None
    """Number of weights that are zero already; None if they were not read."""

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def kind(self) -> str:
        """Name without numbers, shared by all matrices of its kind."""
        name, expert, _ = self.name.partition("[")
        return ".".join("*" if part.isdigit() else part for part in name.split(".")) + ("[*]" if expert else "")


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """A model before pruning."""

    model: str
    model_type: str
    parameters: int
    blocks: tuple[str, ...]
    """Names of the blocks."""
    matrices: tuple[InspectedMatrix, ...]
    """Matrices of all blocks in order, then those outside that would be pruned."""
    left_out: tuple[str, ...]
    """Layers that cannot be pruned as matrices, each with the reason."""
    target: Target
    """Target of the whole model."""
    allocation: str
    stored: tuple[str, ...] = ()
    """Formats of quantised weights, one line per kind."""
    removable: Mapping[str, int] = field(default_factory=dict)
    """Parameters that would go with `remove="channels=0.25"` and the like, of a language model; a run proves whether they can."""

    @property
    def chosen(self) -> list[InspectedMatrix]:
        """The matrices that would be pruned."""
        return [matrix for matrix in self.matrices if matrix.target is not None]

    def headline(self) -> str:
        """Return the size and the number of blocks."""
        return f"{self.model}: {self.model_type}, {self.parameters:,} parameters, {len(self.blocks)} blocks"

    def sheet(self) -> Sheet:
        """Return a line per kind of matrix, and the totals."""
        rows = [
            ("prune" if group[0].target is not None else "leave", kind, _shape(group), str(len(group)), _present(group))
            for kind, group in self._kinds()
        ]
        return Sheet(f"{self.headline()}; {self._in_all()}", rows, ("", "matrices", "shape", "number", "zero already"))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, every_matrix: bool = False) -> list[str]:
        """Return everything as lines. every_matrix: one line per matrix instead of one per kind."""
        return [
            f"{self.headline()} ({self.blocks[0]} … {self.blocks[-1]})",
            *(self._matrix_lines() if every_matrix else self._kind_lines()),
            *([] if self.allocation == "uniform" else self._allocation_lines()),
            *(f"  leave  {layer}" for layer in self.left_out),
            *(f"  stored  {line}" for line in self.stored),
            self._in_all(),
            *(f"could go  {one}" for one in self._removals()),
        ]

    def _removals(self) -> Iterator[str]:
        for part, gone in self.removable.items():
            yield f"{part}: {gone:,} parameters, {per_cent(gone / self.parameters, 0)} of the model"

    def _in_all(self) -> str:
        chosen, share = self.chosen, self.target.sparsity
        pruned = sum(matrix.size for matrix in chosen)
        return (
            f"would prune {len(chosen)} matrices with {pruned:,} weights ({per_cent(pruned / self.parameters)} of the model) to "
            f"{per_cent(share)} ({self.target.pattern}), {per_cent(pruned * share / self.parameters)} of the model"
        )

    def _kinds(self) -> Iterator[tuple[str, list[InspectedMatrix]]]:
        """Group matrices whose names differ only in numbers."""
        kinds: dict[tuple[str, tuple[int, int], bool], list[InspectedMatrix]] = defaultdict(list)
        for matrix in self.matrices:
            kinds[matrix.kind, matrix.shape, matrix.target is not None].append(matrix)
        return ((kind, group) for (kind, _, _), group in kinds.items())

    def _kind_lines(self) -> Iterator[str]:
        for kind, group in self._kinds():
            what = "prune" if group[0].target is not None else "leave"
            yield f"  {what}  {kind}  {_shape(group)}  ({len(group)}){_zero(group)}"

    def _matrix_lines(self) -> Iterator[str]:
        for matrix in self.matrices:
            what = "leave" if matrix.target is None else "prune"
            aim = "" if matrix.target is None else f"  to {matrix.target}"
            yield f"  {what}  {matrix.name}  {_shape([matrix])}{aim}{_zero([matrix])}"

    def _allocation_lines(self) -> Iterator[str]:
        """Yield each block's sparsity and that of its least and most pruned matrix."""
        least, mean, most = _spread(self.chosen)
        span = f"from {per_cent(least)} to {per_cent(most)} sparse, {per_cent(mean)} in all"
        yield f"allocation {self.allocation}: matrices {span}."
        places: dict[str, list[InspectedMatrix]] = defaultdict(list)
        for matrix in self.chosen:
            places[matrix.block or matrix.name].append(matrix)
        for place, group in places.items():
            least, mean, most = _spread(group)
            yield f"  {place}  {per_cent(mean)}  ({per_cent(least)} … {per_cent(most)})"


def _spread(matrices: Sequence[InspectedMatrix]) -> tuple[float, float, float]:
    """Return the least, mean and largest target sparsity of some matrices."""
    sparsities = [matrix.target.sparsity for matrix in matrices if matrix.target is not None]
    sizes = [matrix.size for matrix in matrices]
    mean = sum(sparsity * size for sparsity, size in zip(sparsities, sizes, strict=True)) / sum(sizes)
    return min(sparsities), mean, max(sparsities)


def _shape(matrices: Sequence[InspectedMatrix]) -> str:
    rows, columns = matrices[0].shape
    return f"{rows} × {columns}"


def _present(matrices: Sequence[InspectedMatrix]) -> str:
    """Return the present sparsity of some matrices; empty if they were not read."""
    zeros = [matrix.zeros for matrix in matrices if matrix.zeros is not None]
    return per_cent(sum(zeros) / sum(matrix.size for matrix in matrices)) if len(zeros) == len(matrices) else ""


def _zero(matrices: Sequence[InspectedMatrix]) -> str:
    present = _present(matrices)
    return f"  {present} zero" if present else ""
