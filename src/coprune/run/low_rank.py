"""Matrices of low rank in a run: which layers get one, and what is told of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.words import LeaveOut
from coprune.evaluation.measurement import Accuracy, Measured, Perplexity
from coprune.model.adapter_folder import adapter_config
from coprune.model.checkpoint.load import quiet_transformers
from coprune.model.low_rank_factors import Factors, may_get_factors, stored_factors, take_away, wrap
from coprune.model.matrices import Matrix
from coprune.model.walk.model_structure import ProvenModel
from coprune.pruning.pruner import MatrixResult
from coprune.recipe.pattern import Pattern
from coprune.report.figures import LowRankFacts


def wrap_layers(model: ProvenModel, called: Collection[str]) -> dict[str, str]:
    """Prepare the layers of pruned matrices for added factors, as far as PEFT can load them.

    Args:
        model: not pruned yet.
        called: names of the matrices whose layers were called in a forward.

    Returns:
        The reasons of the matrices that get no factors, by name.

    Raises:
        BadInput: no matrix gets any.
    """
    reasons = {matrix.parameter: "it lies outside the blocks" for matrix in model.chosen.outside}
    wrapped = 0
    for matrix in (matrix for block in model.chosen.blocks for matrix in block):
        if (reason := _why_not(matrix, called)) is None:
            wrap(matrix)
            wrapped += 1
        else:
            reasons[matrix.parameter] = reason
    if not wrapped:
        name, reason = next(iter(reasons.items()))
        cause = f"no pruned matrix can get low-rank factors ({name}: {reason})"
        raise BadInput(cause, field="low_rank", fix=LeaveOut("low_rank"))
    return reasons


def _why_not(matrix: Matrix, called: Collection[str]) -> str | None:
    if matrix.expert is not None:
        return "experts that share a parameter get no adapter of PEFT"
    if not may_get_factors(matrix):
        return "it is no linear layer"
    return None if matrix.name in called else "its layer is not called where it is used"


def low_rank_facts(
    results: Sequence[MatrixResult],
    pattern: Pattern,
    left_out: Mapping[str, str],
    alone: Mapping[str, Measured],
    model: PreTrainedModel,
) -> LowRankFacts | None:
    """Return what was added to pruned matrices, and what that takes; None where nothing was.

    Args:
        results: of all pruned matrices.
        pattern: of their zeros.
        left_out: reasons why nothing could be added, by matrix.
        alone: what was measured of the sparse part, by the name of the data.
        model: which tells its size.
    """
    adapted = [result for result in results if result.rank is not None]
    if not adapted:
        return None
    bits, weights = 8 * model.dtype.itemsize, sum(_size(result) for result in results)
    nonzeros = sum(_size(result) - _zeros(result) for result in results)
    added = sum((result.rank or 0) * sum(result.shape) for result in adapted)
    matrices = sum(_bits_of(result.shape, _size(result) - _zeros(result), bits, pattern) for result in results)
    return LowRankFacts(
        rank=max(result.rank or 0 for result in adapted),
        matrices=len(adapted),
        parameters=added,
        adapter_bytes=added * model.dtype.itemsize,
        base_bytes=model.num_parameters() * model.dtype.itemsize,
        sparse_bytes=-(-matrices // 8) + (model.num_parameters() - weights) * model.dtype.itemsize,
        effective_sparsity=1 - (nonzeros + added) / weights,
        alone=dict(_figures(alone)),
        left_out=dict(left_out),
    )


def _bits_of(shape: tuple[int, int], kept: int, bits: int, pattern: Pattern) -> int:
    """Count the bits of a sparse matrix's values and of where they are, in the cheapest of the three forms.

    Args:
        shape: (out, in).
        kept: how many values are not zero.
        bits: of a value.
        pattern: of the zeros.
    """
    rows, size = shape[0], shape[0] * shape[1]
    forms = [size * bits, size + 32 * rows + kept * bits]
    if pattern.n_of_m is not None:
        n, m = pattern.n_of_m
        forms.append(size // m * n * (bits + (m - 1).bit_length()))
    return min(forms)


def _size(result: MatrixResult) -> int:
    return result.shape[0] * result.shape[1]


def _zeros(result: MatrixResult) -> int:
    return round(result.sparsity * _size(result))


def _figures(alone: Mapping[str, Measured]) -> Iterator[tuple[str, float]]:
    for name, measured in alone.items():
        if isinstance(measured, Perplexity | Accuracy):
            yield name, measured.value if isinstance(measured, Perplexity) else measured.top1


def with_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with what its layers add as an adapter of PEFT, as `load_adapter` puts it there."""
    factors: dict[str, Factors] = take_away(model)
    if factors:
        tensors: dict[str, Any] = stored_factors(factors, model.dtype)
        with quiet_transformers():
            model.load_adapter(adapter_state_dict=tensors, peft_config=adapter_config(model, factors))
        model.requires_grad_(False)
    return model
