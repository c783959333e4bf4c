"""What reconstruction trains on, and the order in which it takes its batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-12
"""So that nothing is divided by zero."""
_SMALLEST_PART = 1e-4
"""Of the mean of all features: what a feature's part is at least, so that one that is nearly silent is not all that counts."""


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

    @torch.no_grad()
    def weights(self, batches: Iterable[int]) -> Tensor:
        """By how much an error in each feature counts: one over the feature's part of the dense hidden states.

        Features differ by orders of magnitude: one of 640 holds nine tenths of the size of Gemma-3-270M's hidden states,
        and what reads them scales it down as much, so that errors in it were nearly all of the loss and cost the model
        next to nothing. The square of the loss's gradient by a feature, what its errors would have to be weighed with
        (BRECQ, arXiv 2102.05426), goes with one over its size there (correlation of logarithms -0.76 to -0.95 behind all
        blocks but the last), and this takes no backward pass through the whole model.

        Args:
            batches: numbers of those that are looked at.

        Returns:
            H float32; all of them 1 where all features are of one size.
        """
        numbers = [*batches]
        total = torch.zeros((), device=self.targets[numbers[0]].device)
        for batch in numbers:
            squares = self.targets[batch].to(torch.float32).square()
            parts = squares / squares.sum(dim=-1, keepdim=True).clamp_min(_TINY)
            parts = parts.flatten(0, -2) if self.counted is None else parts[self.counted[batch]]
            total = total + self.shares[batch] * parts.mean(dim=0)
        shares = sum(self.shares[batch] for batch in numbers)
        return 1 / (total * (len(total) / shares)).clamp_min(_SMALLEST_PART)

    def error(self, batch: int, output: Tensor, weights: Tensor) -> Tensor:
        """The error of what the block gives for a batch, mean over the tokens that count: e, or 1 + log e beyond 1.

        e is the relative error of a token. A pruned block may make a few tokens many times larger than the dense one
        does, and their e, up to 30 where the median is 0.006 in Gemma-3-270M, was nearly all of a mean of e and of its
        gradient. What reads them normalises them, so that they can be no worse than wholly wrong.

        weights: H float32, of the features.
        """
        relative = _relative_errors(output, self.targets[batch], weights)
        errors = torch.where(relative < 1, relative, 1 + relative.clamp_min(1).log())
        return errors.mean() if self.counted is None else errors[self.counted[batch]].mean()


def endless(batches: Sequence[int], seed: int) -> Iterator[int]:
    """All batches in a random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for position in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[position]


def _relative_errors(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Squared error, token by token relative to the size of the dense hidden state, both with features weighed.

    The next block normalises each token by its size; without that the first token of many models, a thousand
    times larger than the others, would be all that counts.
    """
    dense = target.to(torch.float32)
    error = ((output.to(torch.float32) - dense).square() * weights).sum(dim=-1)
    return error / (dense.square() * weights).sum(dim=-1).clamp_min(_TINY)
