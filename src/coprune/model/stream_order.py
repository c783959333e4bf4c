"""Put the features of a model's residual stream into another order, in all parameters that write or read them.

Norms treat every feature alike but for their weights, so a model whose embeddings, norms, matrices and head all have the
features in the same other order computes what it did; only its hidden states come out in that order. Which dimension of a
parameter runs over the features is told by its size, and where two have that size by whether the matrix's inputs were
seen to come from inside its block. Whoever permutes proves it on the logits, and takes it back where it does not hold.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coprune.model.folding import bias_of
from coprune.model.matrices import Matrix, find_matrices


@dataclass(frozen=True)
class StreamAxes:
    """Along which dimension every parameter that knows the residual stream runs over its features."""

    size: int
    """How many features there are."""
    axes: Mapping[str, int]

    def reads(self, matrix: Matrix) -> bool:
        """Whether a matrix's inputs are the features."""
        return self.axes.get(matrix.parameter) == _dimensions(matrix)[0]

    @torch.no_grad()
    def permute(self, model: nn.Module, order: Tensor) -> None:
        """Permute the features in place. order: which of them comes to each place, int64."""
        for name, axis in self.axes.items():
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))


def find_stream_axes(model: nn.Module, size: int, inside: Collection[str]) -> StreamAxes | None:
    """Find all parameters that write or read the residual stream of a model, for a trial.

    Args:
        model: in memory.
        size: of the residual stream.
        inside: parameters of matrices whose inputs come from inside a block, so that only their outputs can be the stream.

    Returns:
        What was found; None where the sizes of a parameter's dimensions leave it open.
    """
    axes: dict[str, int] = {}
    matrices = {matrix.parameter: matrix for matrix in find_matrices(model)}
    biases = _biases(matrices)
    for name, parameter in model.named_parameters():
        found = [dimension for dimension, length in enumerate(parameter.shape) if length == size]
        matrix = matrices.get(name)
        if not found or name in biases:
            continue
        if matrix is not None and len(found) > 1:
            reads, writes = _dimensions(matrix)
            found = [writes if name in inside else reads]
        if len(found) > 1 and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            found = [1]
        if len(found) > 1:
            return None
        axes[name] = found[0]
    for bias, of in biases.items():
        matrix = matrices[of]
        if axes.get(of) == _dimensions(matrix)[1]:
            axes[bias] = 0 if matrix.expert is None else 1
    return StreamAxes(size, axes)


def _dimensions(matrix: Matrix) -> tuple[int, int]:
    """The dimensions of the parameter over a matrix's inputs, and over its outputs."""
    first = 0 if matrix.expert is None else 1
    return first + matrix.input_dim, first + 1 - matrix.input_dim


def _biases(matrices: Mapping[str, Matrix]) -> dict[str, str]:
    """The parameters that are added to matrices' outputs, and those of the matrices."""
    named = {
        name: f"{matrix.name}.bias" if matrix.expert is None else f"{name}_bias" for name, matrix in matrices.items()
    }
    return {bias: name for name, bias in named.items() if bias_of(matrices[name]) is not None}
