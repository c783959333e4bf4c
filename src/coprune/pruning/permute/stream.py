"""One order for the features of the residual stream, by the scores of all matrices that read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coprune.base.shown import per_cent
from coprune.model.matrices import Matrix
from coprune.model.removal.find_parts import insides_of
from coprune.model.stream_order import StreamAxes, find_stream_axes
from coprune.model.walk.proven import ProvenModel
from coprune.pruning.permute.search import permute_channels, retained_score

_ROWS = 20_000
"""Rows that the order is chosen by, of all matrices: 120,000 of SmolLM2-135M retain 0.47 % more instead of 0.40 (LOG.md)."""


@dataclass(frozen=True)
class Stream:
    """What an order of the residual stream did."""

    matrices: int
    gained: float
    """How much more N:M retains of the scores that the order was chosen by, as a share."""

    def __str__(self) -> str:
        """For people."""
        return f"and the residual stream, which {self.matrices} read: {per_cent(self.gained)} more of theirs"


@dataclass
class StreamScores:
    """Rows of the scores of the matrices that read the residual stream, evenly spaced, each matrix's over its sum."""

    model: nn.Module
    axes: StreamAxes | None
    """None where nothing can be permuted."""
    readers: dict[str, list[Matrix]] = field(default_factory=dict)
    """By the block's name."""
    _rows: list[Tensor] = field(default_factory=list)
    _passed: int = 0

    @classmethod
    def of(cls, model: ProvenModel) -> StreamScores:
        """Of a model in memory, with nothing in it yet."""
        insides = insides_of(model)
        folds, width = [fold for found in insides.folds.values() for fold in found], insides.width
        inside = {consumer.parameter for fold in folds for consumer in fold.consumers}
        axes = None if width is None else find_stream_axes(model.module, width, inside)
        readers: dict[str, list[Matrix]] = {}
        for block, matrices in zip(model.blocks, model.chosen.blocks, strict=True):
            readers[block.name] = [matrix for matrix in matrices if axes is not None and axes.reads(matrix)]
        return cls(model.module, axes, readers)

    def add(self, block: str, score_of: Callable[[Matrix], Tensor]) -> None:
        """Take rows of a block's matrices. score_of: gives O × I float32, not negative."""
        total = sum(matrix.shape[0] for matrices in self.readers.values() for matrix in matrices)
        step = max(1, total // _ROWS)
        for matrix in self.readers[block]:
            first, rows = -self._passed % step, matrix.shape[0]
            self._passed += rows
            if first < rows:
                score = score_of(matrix)
                self._rows.append(score[first::step] / score.sum().clamp_min(torch.finfo(score.dtype).tiny))

    def permute(self, n_of_m: tuple[int, int], holds: Callable[[], bool]) -> Stream | None:
        """Find the best order and apply it in place; take it back where the model computes something else then.

        holds: whether the model computes what it did. Returns what that did, None if nothing.
        """
        n, m = n_of_m
        if self.axes is None or not self._rows or self.axes.size % m:
            return None
        score = torch.cat([rows.to(self._rows[0].device) for rows in self._rows])
        order = permute_channels(score, n, m)
        before, after = retained_score(score, n, m), retained_score(score[:, order.to(score.device)], n, m)
        if after <= before:
            return None
        self.axes.permute(self.model, order)
        if not holds():
            self.axes.permute(self.model, order.argsort())
            return None
        return Stream(sum(map(len, self.readers.values())), after / before - 1)
