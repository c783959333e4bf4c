"""Weights shared by several blocks, which are pruned once before the walk over the blocks.

Their statistics are sums over all blocks that use them, always of the dense model: a weight shared by an early and a
late block is pruned before the late block's inputs in the pruned model are known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from coprune.base.devices import memory_within
from coprune.base.processes import Processes
from coprune.model.blocks import Block
from coprune.model.checkpoint.formats import Rounding
from coprune.model.matrices import Matrix
from coprune.model.walk.block_events import MatricesReady
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.recording import Dense, Recording
from coprune.model.walk.statistics import Gram, Statistic
from coprune.model.walk.walk import Walk
from coprune.pruning.pruner import MatrixResult, Solving, prune_walk
from coprune.recipe.pattern import Target
from coprune.run.calibrating import record_calibration
from coprune.run.context import Run
from coprune.run.output import BlockOutcome

Together = tuple[str, ...]
"""Key of matrices fed by the same tensors in all blocks: the first matrix fed by each of these tensors."""


class DenseCopies:
    """Copies of shared weights from before they are pruned; all of them are held."""

    def __init__(self, model: ProvenModel) -> None:
        self._blocks = model.structure.shared
        self._dense: dict[str, Tensor] = {}
        for uses in model.chosen.several:
            copy = getattr(uses[0].owner, uses[0].attribute).detach().clone()
            self._dense |= dict.fromkeys((matrix.name for matrix in uses), copy)

    @contextmanager
    def within(self, block: Block) -> Iterator[None]:
        """Give a block its dense values within the body."""
        own = [
            (getattr(m.owner, m.attribute), self._dense[m.name]) for group in self._blocks[block.index] for m in group
        ]
        now = [parameter.data for parameter, _ in own]
        try:
            for parameter, dense in own:
                parameter.data = dense
            yield
        finally:
            for (parameter, _), values in zip(own, now, strict=True):
                parameter.data = values


def prune_shared(run: Run, target_of: Callable[[Matrix], Target], rounded: list[Rounding]) -> list[MatrixResult]:
    """Prune the weights shared by several blocks, or restore them from an earlier run.

    rounded: receives the rounding done meanwhile, and is emptied.
    """
    before = run.output.shared_before()
    if before is not None:
        return before.results
    with memory_within(lambda: "the weights that several blocks share"):
        groups = _groups(run.model)
        recording = record_calibration(run)
        if recording is None:
            shown = (MatricesReady([matrix], None) for matrices in groups.values() for matrix in matrices)
        else:
            blocks = len(run.model.shared_alone().blocks)
            with run.reporter.bar("Looking at weights that blocks share", blocks) as advance:
                inputs = inputs_of_shared(run.model, recording, run.solver.statistic, run.processes, advance)
            shown = (MatricesReady(groups[key], inputs.pop(key)) for key in groups)
        solving = Solving(run.processes, [list(groups.values())], gram=run.solver.statistic is Gram)
        results = prune_walk(shown, run.solver, target_of, run.recipe.evaluate.layer_error, solving=solving)
    own = sum((part for parts in run.processes.gather(rounded) for part in parts), Rounding())
    rounded.clear()
    run.output.write_shared(BlockOutcome(results, [], rounded=own))
    return results


def inputs_of_shared(
    model: ProvenModel,
    recording: Recording,
    statistic: type[Statistic] | None,
    processes: Processes,
    advance: Callable[[float], None] = lambda blocks: None,
) -> dict[Together, Inputs]:
    """Walk over the dense model and sum the inputs of the weights that several blocks share.

    Args:
        model: the dense model.
        recording: the batches, at the first block.
        statistic, processes, advance: as in `Walk`.
    """
    keys = _keys(model)
    uses = Counter(
        key for groups in model.structure.shared for key in {keys[m.name] for group in groups for m in group}
    )
    found: dict[Together, Inputs] = {}
    for event in Walk(model.shared_alone(), recording, statistic, Dense(), processes=processes, advance=advance):
        if not isinstance(event, MatricesReady) or event.inputs is None:
            continue
        for key, matrix in {keys[matrix.name]: matrix for matrix in event.matrices}.items():
            if key not in found:
                width, device = matrix.shape[1], matrix.stored().device
                sums = None if statistic is None else statistic(width, device)
                found[key] = Inputs(sums, InputSample(width, uses[key], device))
            found[key].merge(event.inputs, uses[key])
    return found


def _keys(model: ProvenModel) -> dict[str, Together]:
    """Return each shared matrix's key, by all of its names."""
    leaders = {m.name: group[0].name for groups in model.structure.shared for group in groups for m in group}
    several = model.chosen.several
    return {matrix.name: tuple(leaders[one.name] for one in uses) for uses in several for matrix in uses}


def _groups(model: ProvenModel) -> dict[Together, list[Matrix]]:
    """Return the shared matrices under their first names, grouped by key."""
    keys, groups = _keys(model), defaultdict[Together, list[Matrix]](list)
    for uses in model.chosen.several:
        groups[keys[uses[0].name]].append(uses[0])
    return dict(groups)
