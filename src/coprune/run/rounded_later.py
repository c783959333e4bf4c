"""Rounding of blocks that are trained after they were pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from coprune.model.blocks import Block
from coprune.model.matrices import Matrix
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.proven import ProvenModel
from coprune.model.walk.shown import BlockDone, MatricesReady
from coprune.pruning.pruner import MatrixResult, round_matrix
from coprune.recipe.pattern import Target


class RoundedLater:
    """Rounds the matrices of a block when it has been trained, which would move rounded weights off their grid."""

    def __init__(self, model: ProvenModel, target_of: Callable[[Matrix], Target]) -> None:
        self._in_blocks = {matrix.name: matrix for block in model.chosen.blocks for matrix in block}
        self._final = target_of
        self._inputs: dict[str, Inputs | None] = {}

    def target_of(self, matrix: Matrix) -> Target:
        """What a matrix becomes when it is pruned; those outside the blocks are not trained, and rounded at once."""
        final = self._final(matrix)
        return final.without_grid() if matrix.name in self._in_blocks else final

    def noting(self, walk: Iterable[MatricesReady | BlockDone]) -> Iterator[MatricesReady | BlockDone]:
        """Pass on what a walk shows, and keep what is known of the matrices' inputs until their block is done."""
        for event in walk:
            if isinstance(event, MatricesReady):
                self._inputs |= {matrix.name: event.inputs for matrix in event.matrices}
            yield event
            if isinstance(event, MatricesReady) and event.inputs is not None and event.inputs.statistic is not None:
                seen = event.inputs.statistic
                seen.restore(seen.sums, seen.count)  # lets go of what was worked out for the solver

    def round(self, block: Block, results: Sequence[MatrixResult]) -> list[MatrixResult]:
        """Round what was pruned in a trained block, by the inputs that its matrices had when they were pruned."""
        inputs, self._inputs = self._inputs, {}
        matrices = [self._in_blocks[result.name] for result in results]
        return [
            round_matrix(matrix, inputs[matrix.name], self._final(matrix), result)
            for matrix, result in zip(matrices, results, strict=True)
        ]
