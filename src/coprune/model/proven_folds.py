"""The folds of a model's blocks, found on a short sample; permutation, rotation and removal share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from coprune.model.blocks import Block
from coprune.model.folding import Fold, find_folds, heads_of
from coprune.model.walk.block_calls import Stream
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.recording import Dense, Recording, record_batches
from coprune.model.walk.walk import Walk

_TOKENS = 64
"""Few tokens suffice to see a fold's effect."""


def first_tokens(sample: Tensor) -> Tensor:
    """Return the first tokens of a text, or a whole image."""
    return sample if sample.is_floating_point() else sample[:, :_TOKENS]


@dataclass(frozen=True)
class OnSample:
    """A block with its inputs for a short sample, to be run."""

    recording: Recording
    block: Block
    before: Tensor
    """Hidden states."""

    def __call__(self, streams: Sequence[Stream] | None = None) -> Tensor:
        """Run the block. streams: as in `Recording.run`."""
        return self.recording.run(self.block, 0, self.before, streams)

    def streams(self) -> list[Stream]:
        """Copy the block's streams from earlier blocks."""
        return self.recording.streams_of(0)


def folds_of_blocks(model: ProvenModel) -> Iterator[tuple[Block, list[Fold], OnSample]]:
    """Yield every block while its weights are loaded: its folds, and a function that runs it on the sample."""
    recording = record_batches(model, [first_tokens(model.structure.sample)])
    for event in Walk(model.idle(), recording, None, Dense(keep=Tensor.clone)):
        if isinstance(event, BlockDone):
            run = OnSample(recording, event.block, event.before[0])
            yield event.block, find_folds(model.structure.groups[event.block.index], heads_of(model.module), run), run


def known_folds(model: ProvenModel) -> Mapping[str, Sequence[Fold]]:
    """Return the folds of every block by name, cached. The model has to be in memory."""
    if not model.structure.folds:
        model.structure.folds = {block.name: found for block, found, _ in folds_of_blocks(model)}
    return model.structure.folds
