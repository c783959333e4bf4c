"""How the rows of one matrix become the inputs of another, where these are channels of their own or of attention heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How rows of a producer become inputs of a consumer: channels that may be permuted among each other.

    segments: permutations that are independent of each other (key-value heads), each of `size` channels; repeats: how
    many times in a row the consumer has each segment (query heads per key-value head); copies: rows of a producer for
    each channel (2 where gate and up are one matrix), interleaved or one stack after the other; before: rows of the producer
    that a segment has beside its channels, and before them (queries and keys, or keys alone); stacks: whether these are
    all queries, then all keys, then all channels.
    """

    segments: int
    size: int
    repeats: int = 1
    copies: int = 1
    interleaved: bool = False
    before: int = 0
    stacks: bool = False

    def columns(self, orders: Tensor) -> Tensor:
        """The order of the consumer's inputs. orders: segments × size int64, within each segment."""
        starts = torch.arange(self.segments * self.repeats)[:, None] * self.size
        return (orders.repeat_interleave(self.repeats, dim=0) + starts).reshape(-1)

    def rows(self, orders: Tensor) -> Tensor:
        """The order of the producer's outputs."""
        if self.before:
            rows = torch.arange(self.segments * (self.before + self.size))
            values = self._values(rows)
            rows[values] = values.gather(1, orders)
            return rows
        channels = (orders + torch.arange(self.segments)[:, None] * self.size).reshape(-1)
        copy = torch.arange(self.copies)
        if self.interleaved:
            return (channels[:, None] * self.copies + copy).reshape(-1)
        return (channels + copy[:, None] * len(channels)).reshape(-1)

    def channels(self) -> Tensor:
        """Which of the producer's outputs are a segment's channels, where each channel has one: segments × size int64."""
        return self._values(torch.arange(self.segments * (self.before + self.size)))

    def _values(self, rows: Tensor) -> Tensor:
        """Those of a producer's outputs that are channels, and not before them: segments × size."""
        if self.stacks:
            return rows[-self.segments * self.size :].view(self.segments, self.size).clone()
        return rows.view(self.segments, self.before + self.size)[:, -self.size :].clone()

    def rows_of(self, units: Tensor) -> Tensor:
        """What is said of every unit (of every segment, or channel where there is one), said of every row of the producer."""
        if self.stacks:
            return torch.cat([units.repeat_interleave(times * self.size) for times in (self.repeats, 1, 1)])
        if self.before:
            return units.repeat_interleave(self.before + self.size)
        channels = units if len(units) == self.segments * self.size else units.repeat_interleave(self.size)
        return channels.repeat_interleave(self.copies) if self.interleaved else channels.repeat(self.copies)

    def scores(self, score: Tensor) -> Tensor:
        """Every segment's scores, with those of its repeats below each other. score: O × I → segments × O' × size."""
        parts = score.reshape(score.shape[0], self.segments, self.repeats, self.size)
        return parts.permute(1, 2, 0, 3).reshape(self.segments, -1, self.size)

    def is_heads(self) -> bool:
        """Whether its channels are those of attention heads, or simply channels."""
        return self.segments > 1 or self.repeats > 1 or self.before > 0


@dataclass(frozen=True)
class Heads:
    """Attention heads by the configuration, as far as it says so."""

    size: int | None
    """Width of one."""
    count: int | None
    """Query heads."""


def heads_of(model: Any) -> Heads:
    """What the configuration says of attention heads."""
    config = model.config.get_text_config()
    size, count = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
    # Where stages have numbers of their own, a list says them.
    count = count if isinstance(count, int) and count else None
    width = getattr(config, "hidden_size", None)
    return Heads(width // count if size is None and count and width else size, count)


def head_size(model: Any) -> int | None:
    """Width of an attention head by the configuration, if it says so."""
    return heads_of(model).size
