"""Prune the blocks that a walk shows with one method, and note what was done to every matrix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from pydantic import BaseModel, ConfigDict

from coprune.errors import NumericalError
from coprune.methods.base import Method
from coprune.model.blocks import Block
from coprune.model.matrices import Matrix
from coprune.patterns import Target
from coprune.statistics import Gram, relative_layer_error
from coprune.walk import BlockDone, Inputs, MatricesReady


class MatrixResult(BaseModel):
    """What became of one matrix."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int, int]
    """(out, in)"""
    sparsity: float
    """Fraction of zeros after pruning."""
    relative_layer_error: float | None
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on its calibration inputs; None if not measured."""
    tokens: int | None
    """Calibration tokens that it was multiplied with; for an expert, those routed to it."""
    mask_checksum: str
    """CRC-32 of its zeros, by which a reloaded matrix is compared."""
    seconds: float
    events: tuple[str, ...] = ()


def prune_walk(
    walk: Iterable[MatricesReady | BlockDone],
    method: Method,
    target_of: Callable[[Matrix], Target],
    layer_error: bool = True,
    block_done: Callable[[Block, list[MatrixResult]], None] = lambda block, results: None,
) -> list[MatrixResult]:
    """Prune every matrix that the walk shows, in place.

    target_of: pattern and sparsity of each matrix; layer_error: measure it (on the Gram matrix where the method has
    one, else on the sample of inputs); block_done: called with every finished block and what was done in it.
    Returns the results of all blocks and of what was shown after them.
    Raises NumericalError with the name of the matrix.
    """
    results: list[MatrixResult] = []
    first = 0  # of the block at hand
    for event in walk:
        if isinstance(event, MatricesReady):
            results += [
                prune_matrix(matrix, event.inputs, method, target_of(matrix), layer_error) for matrix in event.matrices
            ]
        else:
            block_done(event.block, results[first:])
            first = len(results)
    return results


def prune_matrix(
    matrix: Matrix, inputs: Inputs | None, method: Method, target: Target, layer_error: bool
) -> MatrixResult:
    """Prune one matrix in place and measure what that did to its outputs."""
    started = time.perf_counter()
    weight = matrix.read()
    statistic = None if inputs is None else inputs.statistic
    try:
        pruned = method.prune(weight, statistic, target)
    except NumericalError as error:
        raise NumericalError(f"{matrix.name}: {error}") from error
    matrix.write(pruned.weight)
    layer_error_after = None
    if layer_error and inputs is not None and inputs.sample.count:
        # The error of what the model now holds, so after rounding to its dtype.
        after = matrix.read()
        if isinstance(statistic, Gram):
            layer_error_after = relative_layer_error(statistic.gram, weight, after)
        else:
            layer_error_after = inputs.sample.relative_error(weight, after)
    return MatrixResult(
        name=matrix.name,
        shape=matrix.shape,
        sparsity=matrix.zeros() / weight.numel(),
        mask_checksum=matrix.mask_checksum(),
        relative_layer_error=layer_error_after,
        tokens=None if inputs is None else inputs.sample.count,
        seconds=time.perf_counter() - started,
        events=pruned.events,
    )
