"""The walk: the only loop over blocks in the project.

It loads one block at a time, yields its matrices with their inputs for the caller to change, and advances the calibration data
to the next block. Later blocks see the caller's changes; without any they see the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from coprune.base.devices import memory_within
from coprune.base.errors import UnsupportedModel
from coprune.base.processes import ALONE, Processes
from coprune.base.words import Set
from coprune.model.blocks import Block
from coprune.model.matrices import Matrix
from coprune.model.walk.activations import Activations
from coprune.model.walk.block_calls import Stream, cloned, run_after_blocks
from coprune.model.walk.block_events import NO_PAST, OUTSIDE, BlockDone, MatricesReady, Past
from coprune.model.walk.inputs import Gathered, InputSample
from coprune.model.walk.lockstep import Lanes, Lockstep, Paging
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.model.walk.observe import Observe
from coprune.model.walk.recording import BY_BLOCK, ByBlock, Dense, Moves, Recording, Sequential, record_batches
from coprune.model.walk.statistics import Statistic

AFTER = "after the blocks"


@dataclass
class Walk:
    """A walk over the blocks; iterate over it once.

    Raises ValueError if stored statistics do not fit the moves or the processes.
    """

    model: FoundModel
    """A ProvenModel, if data runs through it."""
    recording: Recording | None = None
    """None to yield the blocks without running data through them."""
    statistic: type[Statistic] | None = None
    """Statistic to gather for every matrix; None for none (a sample of the inputs is always kept)."""
    moves: Moves = BY_BLOCK
    """How inputs advance from block to block, and which of them are kept."""
    past: Past = NO_PAST
    processes: Processes = ALONE
    """Processes that walk together, each with its share of the samples."""
    advance: Callable[[float], None] = lambda blocks: None
    """Called with the completed share of a block, for a progress bar."""
    at: str = field(default="before the blocks", init=False)
    """Position of the walk: the name of a block."""

    def __post_init__(self) -> None:
        if self.past.known and (isinstance(self.moves, Sequential) or self.processes.size > 1):
            raise ValueError("the stored inputs of the dense model do not fit this walk")

    def __iter__(self) -> Iterator[MatricesReady | BlockDone]:
        self._refuse_used_twice()
        blocks, weights = self.model.blocks, self.model.weights
        part = blocks[0].part if blocks else 0
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            self.at = block.name
            with memory_within(lambda: self.at):
                if block.part != part:
                    part = block.part
                    self._enter(block)
                weights.acquire(block.name)
                try:
                    if following is not None:
                        weights.prefetch(following.name)
                    if block.name in self.past.finished:
                        self._pass(block)
                    else:
                        yield from self._visit(block)
                finally:
                    weights.release(block.name)
        self.at = AFTER
        if self.model.chosen.outside:
            with memory_within(lambda: self.at):
                yield from self._visit_outside()

    def _refuse_used_twice(self) -> None:
        reused = self.model.structure.reused if isinstance(self.model, ProvenModel) else []
        if isinstance(self.moves, Sequential) and reused:
            raise UnsupportedModel(
                f"{reused[0]} is used more than once in a forward, so it cannot be pruned just before its first use",
                fix=("take ", Set("propagation", "block")),
            )

    def _enter(self, block: Block) -> None:
        """Enter a further list of blocks with the outputs of the one before it."""
        if self.recording is not None and isinstance(self.model, ProvenModel):
            for batch in range(len(self.recording.hidden)):
                self.recording.enter(self.model, block, batch)

    def _pass(self, block: Block) -> None:
        """Advance the inputs through a finished block."""
        self._run_dense(block)
        if isinstance(self.moves, Dense):
            self._run(block, share=1.0)
        self.past.restore(block)
        if not isinstance(self.moves, Dense):
            self._run(block, share=1.0)

    def _visit(self, block: Block) -> Iterator[MatricesReady | BlockDone]:
        kept = self._keep(block) if isinstance(self.moves, Dense) else ()
        yield from self._show(block)
        recording, moves = self.recording, self.moves
        if recording is None:
            yield BlockDone(block)
        elif isinstance(moves, Dense):
            yield BlockDone(block, kept, recording.hidden)
        else:
            after = recording.dense if recording.dense is not None else ()
            yield BlockDone(block, recording.hidden if moves.keep_inputs else (), after)
            if isinstance(moves, ByBlock) or moves.keep_inputs:
                self._run(block, share=0.5)

    def _keep(self, block: Block) -> Sequence[Tensor]:
        assert isinstance(self.moves, Dense)
        if self.recording is None or self.moves.keep is None:
            return ()
        hidden = self.recording.hidden
        count = len(hidden) if self.moves.batches is None else min(self.moves.batches, len(hidden))
        return [self.moves.keep(hidden[batch]) for batch in range(count)]

    def _show(self, block: Block) -> Iterator[MatricesReady]:
        known = block.name in self.past.known
        if not isinstance(self.model, ProvenModel) or (self.recording is None and not known):
            yield from (MatricesReady([matrix], None) for matrix in self.model.chosen.blocks[block.index])
            self.advance(1.0)
            return
        gathered = self._gathered(block.name, self.model.structure.groups[block.index])
        if known:
            self._run_dense(block)
            if isinstance(self.moves, Dense):
                self._run(block, share=1.0)
            else:
                self.advance(0.5)
        elif isinstance(self.moves, Sequential):
            self._run_dense(block)
            yield from self._show_in_step(block, gathered)
        else:
            self._observe(block, gathered)
        # Sequential moves leave only experts without tokens; the others leave everything.
        yield from (MatricesReady(group, inputs) for group, inputs in gathered.take_all())

    def _observe(self, block: Block, gathered: Gathered) -> None:
        """Run a block with its dense weights on its inputs, and gather its matrices' inputs."""
        assert self.recording is not None
        once = isinstance(self.moves, Dense)
        self._run_dense(block)
        with self._as_moved(block):
            for batch in range(len(self.recording.hidden)):
                chosen, see = self.model.chosen.blocks[block.index], partial(gathered.see, batch)
                with Observe(chosen, see, hear=gathered.hear(batch)):
                    if once:
                        self.recording.move(block, batch)
                    else:
                        self.recording.run(block, batch, self.recording.hidden[batch])
                self.advance((1.0 if once else 0.5) / len(self.recording.hidden))

    def _show_in_step(self, block: Block, gathered: Gathered) -> Iterator[MatricesReady]:
        assert self.recording is not None
        assert isinstance(self.moves, Sequential)
        recording, hidden = self.recording, self.recording.hidden
        paging = None if hidden.spare is None else Paging(hidden.spare, hidden.folder)
        left: dict[int, list[Stream]] = {}

        def run(batch: int) -> Tensor:
            # With a memory limit, a copy that can be paged out while the lane waits.
            own = hidden[batch] if paging is None else hidden[batch].clone()
            left[batch] = recording.streams_of(batch)
            if paging is not None:
                left[batch] = [cloned(stream) for stream in left[batch]]
            return recording.run(block, batch, own, left[batch])

        def finish(batch: int, output: Tensor) -> None:
            hidden[batch] = output
            recording.moved(batch, left.pop(batch))
            self.advance(1.0 / len(hidden))

        lanes = Lanes(run, gathered.see, None if self.moves.keep_inputs else finish, gathered.hear)
        step = Lockstep(len(hidden), self.model.chosen.blocks[block.index], lanes, self.processes.positions, paging)
        try:
            while (matrix := step.next_matrix()) is not None:
                group, inputs = gathered.take(matrix)
                yield MatricesReady(group, inputs)
                step.solved(group)
        finally:
            step.close()
        self.advance(0.5 if self.moves.keep_inputs else 0.0)

    def _gathered(self, place: str, groups: Sequence[list[Matrix]]) -> Gathered:
        """Return the inputs of a place's groups: the stored ones if known, else empty ones."""
        batches = [] if self.recording is None else self.recording.rows(InputSample.tokens)
        known = self.past.known[place]() if place in self.past.known else {}
        return Gathered(groups, self.statistic, batches, self.processes, known)

    def _run_dense(self, block: Block) -> None:
        """Advance the dense model's hidden states through a block that still has its dense weights."""
        if self.recording is not None and self.recording.dense is not None:
            with self.past.dense(block):
                for batch in range(len(self.recording.dense)):
                    if self.recording.aims is None or batch in self.recording.aims:
                        self.recording.move_dense(block, batch)

    def _as_moved(self, block: Block) -> AbstractContextManager[None]:
        """While open, give a block the weights for advancing the inputs."""
        return self.past.dense(block) if isinstance(self.moves, Dense) else nullcontext()

    def _run(self, block: Block, share: float) -> None:
        """Run a block with its current weights; its outputs become the next block's inputs."""
        if self.recording is None or self._is_last(block):
            self.advance(share)
            return
        with self._as_moved(block):
            for batch in range(len(self.recording.hidden)):
                self.recording.move(block, batch)
                self.advance(share / len(self.recording.hidden))

    def _is_last(self, block: Block) -> bool:
        """Return whether a block's outputs are not used."""
        return block is self.model.blocks[-1] and not self.model.chosen.outside

    def _visit_outside(self) -> Iterator[MatricesReady]:
        """Yield the matrices after the blocks, with their inputs computed from the last block's outputs."""
        model, known, outside = self.model, OUTSIDE in self.past.known, self.model.chosen.outside
        if not isinstance(model, ProvenModel) or (self.recording is None and not known):
            yield from (MatricesReady([matrix], None) for matrix in outside)
            return
        gathered = self._gathered(OUTSIDE, [[matrix] for matrix in outside])
        batches = (
            [] if known or self.recording is None else zip(self.recording.tokens, self.recording.hidden, strict=True)
        )
        for batch, (tokens, hidden) in enumerate(batches):
            with torch.no_grad(), Observe(outside, partial(gathered.see, batch)):
                run_after_blocks(model.module, model.blocks, tokens, model.structure.answers, hidden)
        yield from (MatricesReady(group, inputs) for group, inputs in gathered.take_all())


@torch.no_grad()
def streamed_logits(
    model: ProvenModel,
    windows: Sequence[Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    advance: Callable[[float], None] = lambda blocks: None,
    activations: Activations | None = None,
) -> list[Tensor]:
    """Run batches of windows through the blocks, each read once, and score their logits.

    Args:
        model: the model; its chosen matrices do not matter.
        windows: B × S int64 each, or images.
        score: (logits B × S × V, tokens B × S) → the result of a batch.
        advance: called with the completed share of a block.
        activations: an empty list for the hidden states; without it they are kept in memory.

    Returns:
        The result of every batch.
    """
    recording = record_batches(model, windows, activations)
    for _ in Walk(model.idle(), recording, moves=Dense(), advance=advance):
        pass
    kept = []
    for position, tokens in enumerate(windows):
        hidden = recording.hidden[position]
        kept.append(
            score(run_after_blocks(model.module, model.blocks, tokens, model.structure.answers, hidden), tokens)
        )
    return kept
