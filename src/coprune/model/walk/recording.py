"""The calibration batches, recorded once and then moved from block to block."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from coprune.model.blocks import Block
from coprune.model.walk.activations import Activations
from coprune.model.walk.block_calls import (
    BlockCall,
    Stream,
    TensorPool,
    enter_part,
    in_float32,
    open_streams,
    run_without_blocks,
    snapshot,
)
from coprune.model.walk.inputs import BatchRows, CountedRows
from coprune.model.walk.model_structure import FoundModel, ProvenModel, Structure


@dataclass
class Recording:
    """The calibration batches between blocks: the inputs of the next block, and every block's calls.

    tokens: B × S int64 per batch; hidden: B × S × H per batch; calls: per batch, per block; dense: like hidden, but the dense
    model's, if its outputs are the target; aims: the batches with such a target, None for all; counted: the tokens that
    statistics include, B × S bool per batch, None for all; positions: number of hidden states per batch before the first block
    (for text, its tokens); streams: per batch, the values that earlier blocks left for later ones, in memory; dense_streams:
    the same for the dense model.
    """

    tokens: list[Tensor]
    hidden: Activations
    calls: list[list[BlockCall]]
    dense: Activations | None = None
    aims: Container[int] | None = None
    counted: Sequence[Tensor] | None = None
    positions: list[int] = field(default_factory=list)
    streams: list[list[Stream]] = field(default_factory=list)
    dense_streams: list[list[Stream]] | None = None

    @property
    def uneven(self) -> int | None:
        """Number of tokens in all batches if their samples differ in length; None if they do not."""
        alike = len({batch.shape[1:] for batch in self.tokens}) < 2
        return None if alike else sum(batch.numel() for batch in self.tokens)

    @property
    def shares(self) -> list[float]:
        """Weight of every batch in a mean over batches.

        1, or if only some tokens count or samples differ in length, the batch's counted tokens over the mean batch's.
        """
        if self.counted is None and self.uneven is None:
            return [1.0] * len(self.tokens)
        counts = [one.numel() if self.counted is None else int(one.sum()) for one in self.counted or self.tokens]
        return [count * len(counts) / max(sum(counts), 1) for count in counts]

    def rows(self, kept: int) -> list[BatchRows]:
        """Return the rows to use from every batch. kept: minimum total number of sampled rows."""
        counted = [None] * len(self.tokens) if self.counted is None else [CountedRows(one) for one in self.counted]
        total = self.uneven
        shares = [None if total is None else -(-kept * batch.numel() // total) for batch in self.tokens]
        return [BatchRows(*pair) for pair in zip(counted, shares, strict=True)]

    @torch.no_grad()
    def run(self, block: Block, batch: int, hidden: Tensor, streams: Sequence[Stream] | None = None) -> Tensor:
        """Run a block on hidden states of a batch (B × S × H) with that batch's arguments.

        streams: updated with the values that the block leaves; by default a copy of the batch's.
        """
        own = self.streams_of(batch) if streams is None else streams
        return self.calls[batch][block.index].run(block.module, hidden, own)

    def streams_of(self, batch: int) -> list[Stream]:
        """Copy the streams of a batch for its next block."""
        return [snapshot(stream) for stream in self.streams[batch]] if self.streams else []

    def run_in_float32(self, block: Block, batch: int, hidden: Tensor) -> Tensor:
        """Run a block with float32 parameters, to train it; values that it leaves for other blocks are dropped."""
        streams = [in_float32(stream) for stream in self.streams_of(batch)]
        return self.calls[batch][block.index].in_float32().run(block.module, hidden, streams)

    def move(self, block: Block, batch: int) -> None:
        """Run a block with its current weights on a batch, and update hidden states and streams for the next block."""
        streams = self.streams_of(batch)
        self.hidden[batch] = self.run(block, batch, self.hidden[batch], streams)
        self.moved(batch, streams)

    @torch.no_grad()
    def enter(self, model: ProvenModel, block: Block, batch: int) -> None:
        """Compute a batch's input of a further list of blocks from the output of the list before it."""
        begin = partial(begin_part, model, model.structure, block, self.tokens[batch])
        self.hidden[batch], streams = begin(self.hidden[batch])
        self.moved(batch, streams)
        if self.dense is not None and (self.aims is None or batch in self.aims):
            self.dense[batch], streams = begin(self.dense[batch])
            if self.dense_streams is None:
                self.dense_streams = [self.streams_of(number) for number in range(len(self.streams))]
            if self.dense_streams:
                self.dense_streams[batch] = streams

    def apart(self) -> Recording:
        """Return an independent copy of the batches, without a target."""
        return replace(self, hidden=self.hidden.copy(), streams=[*self.streams], dense=None, dense_streams=None)

    def go_past(self, model: ProvenModel, block: Block, runs: bool = True) -> None:
        """Move all batches past a block. runs: whether the block runs or is left out."""
        begins = block.index > 0 and model.blocks[block.index - 1].part != block.part
        for batch in range(len(self.hidden)):
            if begins:
                self.enter(model, block, batch)
            if runs:
                self.move(block, batch)

    def moved(self, batch: int, streams: list[Stream]) -> None:
        """Store the streams after a block."""
        if self.streams:
            self.streams[batch] = streams

    def move_dense(self, block: Block, batch: int) -> None:
        """Advance the dense model's inputs by a block, as `move`."""
        assert self.dense is not None
        if self.dense_streams is None:
            self.dense_streams = [self.streams_of(number) for number in range(len(self.streams))]
        streams = self.dense_streams[batch] if self.dense_streams else []
        self.dense[batch] = self.run(block, batch, self.dense[batch], streams)


def begin_part(
    model: FoundModel, structure: Structure, block: Block, batch: Tensor, hidden: Tensor
) -> tuple[Tensor, list[Stream]]:
    """Return the input of the first block of a further list, and the streams before it.

    Args:
        model: the model; its blocks need not be loaded.
        structure: of its blocks.
        block: the first block of the list.
        batch: as in `forward_logits`.
        hidden: output of the last block of the list before it.
    """
    first, call = enter_part(model.module, model.blocks, block, batch, structure.answers, hidden)
    streams: list[Stream] = [{} if (own := call.at(place)) is None else own for place in structure.streams]
    beside = {place: call.at(place) for place in structure.handed[block.index].takes}
    return first, [*streams, beside] if any(one.takes for one in structure.handed) else streams


@torch.no_grad()
def record_batches(model: ProvenModel, batches: Sequence[Tensor], activations: Activations | None = None) -> Recording:
    """Run every batch through the model with idle blocks.

    Args:
        model: the model; its blocks need not be loaded.
        batches: B × S int64 each, or images.
        activations: an empty list for the hidden states; without it they are kept in memory.

    Returns:
        The recording, at the first block.
    """
    pool = TensorPool()
    recording = Recording([], Activations() if activations is None else activations, [])
    for tokens in batches:
        hidden, calls = run_without_blocks(model.module, model.blocks, tokens, model.structure.answers)
        recording.tokens.append(tokens)
        recording.hidden.append(hidden)
        recording.positions.append(hidden.shape[:-1].numel())
        handed = [model.structure.handed[block.index] for block in model.blocks]
        calls, streams = open_streams(calls, model.structure.streams, handed)
        recording.calls.append([replace(c, args=pool.share(c.args), kwargs=pool.share(c.kwargs)) for c in calls])
        recording.streams += [streams] if streams else []
        pool.forget_batch()
    return recording


@dataclass(frozen=True)
class ByBlock:
    """As in the papers: statistics come from a block's dense weights, then it runs again with the pruned ones."""

    keep_inputs: bool = False
    """Whether to keep a block's inputs until it is done, for a caller that trains it."""


@dataclass(frozen=True)
class Sequential:
    """Yields every matrix just before its first use, so that it sees the outputs of pruned predecessors, in one pass."""

    keep_inputs: bool = False
    """As in `ByBlock`; the block then runs once more."""


@dataclass(frozen=True)
class Dense:
    """Runs every block once with its dense weights, on the dense model's inputs. Also for callers that only observe."""

    keep: Callable[[Tensor], Tensor] | None = None
    """Returns the part of a batch's inputs (B × S × H) to keep until their block is done; None keeps nothing."""
    batches: int | None = None
    """Number of batches to keep it for, from the first; None for all."""


Moves = ByBlock | Sequential | Dense
BY_BLOCK = ByBlock()
