"""Remove units of one part of a block: choose, solve the consumer anew, silence the rest."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from coprune.model.matrices import Matrix, mask_checksum
from coprune.model.removal.parts import Part, silence
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.statistics import Gram
from coprune.pruning.pruner import MatrixResult
from coprune.pruning.structure.scores import Score, by_norm, refitted


def remove_units(
    module: torch.nn.Module, part: Part, inputs: Mapping[str, Inputs], score: Score, count: int
) -> tuple[list[Tensor], list[MatrixResult]]:
    """Keep `count` units of a part, in place: the others are zeros afterwards.

    Args:
        module: the block.
        part: what may be removed of it.
        inputs: Gram matrices of the consumers' inputs, by name; a consumer that is not named saw no token.
        score: chooses, and says whether the consumer is solved for anew.
        count: units to keep.

    Returns:
        Which units are kept (U bool for each consumer), and figures of the consumers.
    """
    keeps, results = [], []
    for consumer in part.fold.consumers:
        started, weight = time.perf_counter(), consumer.read()
        known, events = _known(inputs.get(consumer.name))
        units = part.units.to(weight.device)
        keep = by_norm(weight, units, count) if known is None else score.keep(weight, known, units, count)
        columns = part.columns(keep)
        solved = refitted(weight, known, columns) if known is not None and score.refit else weight
        consumer.write(solved.masked_fill(~columns, 0.0))
        keeps.append(keep)
        result = _result(consumer, known, weight, columns, time.perf_counter() - started)
        results.append(result.model_copy(update={"events": events}))
    silence(module, part.block, part.masks(keeps))
    return keeps, results


def _known(inputs: Inputs | None) -> tuple[Gram | None, tuple[str, ...]]:
    """Return the Gram matrix of a consumer's inputs if it saw any, and events."""
    statistic = None if inputs is None else inputs.statistic
    if inputs is None or not isinstance(statistic, Gram) or not statistic.count:
        return None, ("no calibration token came to it, so its channels went by their norm",)
    if not bool(
        statistic.gram.diagonal().any()
    ):  # as to an expert that sees all tokens, times zero where they are others'
        return None, ("nothing but zeros came to it, so its channels went by their norm",)
    return statistic, ()


def _result(consumer: Matrix, known: Gram | None, weight: Tensor, columns: Tensor, seconds: float) -> MatrixResult:
    after = consumer.read()
    left = after[:, columns]
    return MatrixResult(
        name=consumer.name,
        shape=(left.shape[0], left.shape[1]),
        sparsity=1 - int(left.count_nonzero()) / left.numel(),
        relative_layer_error=None if known is None else known.relative_error(weight, after),
        tokens=None if known is None else known.count,
        mask_checksum=mask_checksum(left if consumer.input_dim == 1 else left.T),
        seconds=seconds,
    )
