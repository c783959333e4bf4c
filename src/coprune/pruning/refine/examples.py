"""What reconstruction trains on, and the order in which it takes its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """What a block is trained on, batch by batch."""

    inputs: Sequence[Tensor]
    """B × S × H per batch, in the model's dtype."""
    targets: Sequence[Tensor]
    """What the dense block gives, likewise."""
    shares: Sequence[float]
    """By how much every batch counts; one of 0 is not looked at."""
    counted: Sequence[Tensor] | None = None
    """Which tokens count, B × S bool per batch; None for all."""

    def error(self, batch: int, output: Tensor) -> Tensor:
        """The error of what the block gives for a batch, mean over the tokens that count: e, or 1 + log e beyond 1.

        e is the relative error of a token. A pruned block may make a few tokens many times larger than the dense one
        does, and their e, up to 30 where the median is 0.006 in Gemma-3-270M, was nearly all of a mean of e and of its
        gradient. What reads them normalises them, so that they can be no worse than wholly wrong.
        """
        relative = _relative_errors(output, self.targets[batch])
        errors = torch.where(relative < 1, relative, 1 + relative.clamp_min(1).log())
        return errors.mean() if self.counted is None else errors[self.counted[batch]].mean()


def endless(batches: Sequence[int], seed: int) -> Iterator[int]:
    """All batches in a random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for position in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[position]


def _relative_errors(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, token by token relative to the size of the dense hidden state.

    The next block normalises each token by its size; without that weight the first token of many models, a thousand
    times larger than the others, would be all that counts.
    """
    dense = target.to(torch.float32)
    error = (output.to(torch.float32) - dense).square().sum(dim=-1)
    return error / dense.square().sum(dim=-1).clamp_min(1e-12)
