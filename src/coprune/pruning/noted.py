"""What is noted of a matrix that was pruned, as the model now holds it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.base.reading import Reading, refuse_if
from coprune.base.words import Set
from coprune.model.matrices import Matrix, checksum_of, mask_bits
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.sums import ratio_of
from coprune.pruning.distributions import Distributions, distributions_in_host_memory, sampled


class Noted(NamedTuple):
    """Zeros and their checksum, the error of the layer if it was measured, and how weights and inputs are spread."""

    zeros: int
    checksum: str
    layer_error: float | None
    distributions: Distributions


def note(
    reading: Reading, matrix: Matrix, inputs: Inputs | None, weight: Tensor, after: Tensor, layer_error: bool
) -> Noted:
    """Look at a pruned matrix, by one reading.

    Args:
        reading: with what the solving left to be looked at.
        matrix: as the model now holds it.
        inputs: what is known of them.
        weight: before pruning, O × I.
        after: what its layer now multiplies with, O × I: what the matrix holds, and what may be added to it.
        layer_error: whether to measure it.

    Raises:
        NumericalError: of the solving.
    """
    stored = matrix.stored()
    # First, since it takes most memory: nothing else is held beside it.
    errors = _squared_errors(inputs, weight, after) if layer_error and inputs is not None else None
    magnitude, kept = sampled(weight, (stored if matrix.input_dim == 1 else stored.T) != 0)
    norm = None if inputs is None else _norm(inputs)
    read = reading.read(mask_bits(stored), torch.count_nonzero(stored), magnitude, kept, norm, errors)
    bits, count, magnitude, kept = (tensor for tensor in read[:4] if tensor is not None)
    norm, errors = read[4:]
    return Noted(
        stored.numel() - int(count),
        checksum_of(bits),
        None if errors is None else ratio_of(errors),
        distributions_in_host_memory(magnitude, kept, norm),
    )


def refuse_overflow(matrix: Matrix, weight: Tensor, after: Tensor) -> None:
    """Raise NumericalError where weights that were finite are too large for the model's dtype.

    Args:
        matrix: as the model now holds it.
        weight: before pruning, O × I.
        after: what it holds now, O × I.
    """
    if matrix.stored().dtype == torch.float16:  # all others reach as far as float32, in which is solved
        error = NumericalError("pruned weights are too large for float16", fix=("try ", Set("dtype", "bfloat16")))
        refuse_if(torch.isfinite(weight).all() & ~torch.isfinite(after).all(), error)


def _norm(inputs: Inputs) -> Tensor | None:
    """Root mean square of every input channel (I float32), on the sample if nothing better was gathered."""
    if inputs.sample.count == 0:
        return None
    if inputs.statistic is not None:
        return inputs.statistic.root_mean_square
    return inputs.sample.inputs.square().mean(dim=0).sqrt()


def _squared_errors(inputs: Inputs, weight: Tensor, after: Tensor) -> Tensor | None:
    if inputs.sample.count == 0:
        return None
    statistic = inputs.statistic
    known = inputs.sample if statistic is None or not statistic.tells_errors else statistic
    return known.squared_errors(weight, after)
