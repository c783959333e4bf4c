"""A sparse matrix and one of low rank that together stand for a weight (OATS, arXiv 2409.13652; 3BASiL, arXiv 2603.01376).

They are found in turns: what the sparse part leaves over is approximated by a matrix of low rank, where the inputs' Gram
matrix says how much an error counts; then the weight without that is pruned anew, by whichever method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.base.options import require_positive
from coprune.base.precision import full_float32
from coprune.model.low_rank_factors import Factors
from coprune.pruning.masked_fit import row_errors
from coprune.pruning.methods.base import Pruned

OVERSAMPLED = 16
"""Directions that the search carries beyond those that are kept."""
FIRST_STEPS, LATER_STEPS = 8, 3
"""Products with the residual's own Gram matrix, from random directions and from those of the round before."""


@dataclass(frozen=True)
class LowRank:
    """Split a weight into a sparse part and one of low rank, in turns.

    Paper: OATS, arXiv 2409.13652; 3BASiL, arXiv 2603.01376.
    """

    rank: int
    """Rank of the second part; at most the smaller side of the weight."""
    rounds: int = 8
    """Number of prunings of the weight; the best counts."""

    def __post_init__(self) -> None:
        require_positive(rank=self.rank, rounds=self.rounds)

    def split(self, weight: Tensor, gram: Tensor, prune: Callable[[Tensor], Pruned]) -> Pruned:
        """Find the two parts. The error of their sum is never above what `prune` alone would leave.

        For a given sparse part the other is a projection of what that leaves over, which makes no error larger,
        whatever the inputs are. So nothing is damped here.

        Args:
            weight: O × I float32, not modified.
            gram: Gram matrix of the inputs, I × I.
            prune: gives the sparse part of a matrix like the weight.

        Returns:
            The sparse part with the other one as `added` (float32).

        Raises:
            NumericalError: as `prune`, or as `leading_directions`.
        """
        best, directions, rest = None, None, weight
        for _ in range(self.rounds):
            pruned = prune(rest)
            with full_float32():
                left = weight - pruned.weight
                directions = leading_directions(left, gram, self.rank, directions)
                up = directions[:, : self.rank].contiguous()
                added = Factors(up, up.T @ left)
                rest = weight - added.product()
                error = row_errors(rest - pruned.weight, gram).sum()
            found = error, pruned._replace(added=added)
            best = found if best is None else _better(found, best)
        assert best is not None
        return best[1]


def leading_directions(left: Tensor, gram: Tensor, rank: int, start: Tensor | None = None) -> Tensor:
    """Return the directions in the outputs with the largest error, largest first: eigenvectors of RGRᵀ.

    Found by subspace iteration, since a full decomposition of every matrix in every round would take longer than pruning.

    Args:
        left: the error R, O × I float32.
        gram: of the inputs, I × I float32.
        rank: the wanted number.
        start: result of an earlier call for a similar error.

    Returns:
        O × K float32 with orthonormal columns; K is somewhat more than the rank, and at most O.

    Raises:
        NumericalError: the error is not finite in float32.
    """
    basis, steps = start, LATER_STEPS
    if basis is None:
        generator = torch.Generator().manual_seed(0)
        count = min(rank + OVERSAMPLED, len(left))
        basis, steps = torch.randn(len(left), count, generator=generator).to(left.device), FIRST_STEPS
        basis = torch.linalg.qr(basis)[0]
    for _ in range(steps):
        basis = torch.linalg.qr(left @ (gram @ (left.T @ basis)))[0]
    onto = left.T @ basis
    try:
        vectors = torch.linalg.eigh((onto.T @ (gram @ onto)).double()).eigenvectors
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError("the error of the sparse part overflows in float32") from error
    leading: Tensor = vectors.flip(1).to(torch.float32)
    return basis @ leading


def _better(new: tuple[Tensor, Pruned], old: tuple[Tensor, Pruned]) -> tuple[Tensor, Pruned]:
    """Return the one with the smaller error, without reading from the device."""
    improved = new[0] < old[0]

    def choose(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.where(improved, ours, theirs)

    assert new[1].added is not None
    assert old[1].added is not None
    pruned = new[1]._replace(
        weight=choose(new[1].weight, old[1].weight),
        keep=choose(new[1].keep, old[1].keep),
        added=Factors(*map(choose, new[1].added, old[1].added)),
    )
    return torch.minimum(new[0], old[0]), pruned
