"""Samples of several lengths in one tensor: as wide as the longest, with nothing behind the ends of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

NOTHING = -1
"""Stands behind the end of a sample; no token has this number."""


def padded(parts: Sequence[Tensor], nothing: int | bool) -> Tensor:
    """Samples of several parts below each other. parts: N × S, S its own in each; nothing: what stands behind an end."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=nothing) for part in parts])


def lengths_of(tokens: Tensor) -> Tensor:
    """How long every sample is: N int64. tokens: N × S int64."""
    return (tokens != NOTHING).sum(dim=1)


def of_each_length(tokens: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Numbers of the samples of one length (int64), and that length, in the order of their first samples."""
    lengths = lengths_of(tokens)
    for length in dict.fromkeys(lengths.tolist()):
        yield (lengths == length).nonzero().flatten(), length


def first_of_a_length(tokens: Tensor) -> Tensor:
    """The samples that are as long as the first one, with nothing behind them: N × S int64."""
    if len(tokens) == 0:
        return tokens
    rows, length = next(of_each_length(tokens))
    return tokens[rows, :length]


def a_longest(tokens: Tensor) -> Tensor:
    """The first of the longest samples: 1 × S int64."""
    place = int(lengths_of(tokens).argmax())
    return tokens[place : place + 1]
