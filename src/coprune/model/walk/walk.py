"""The walk: the only loop over blocks in the project.

A generator that takes up one block at a time, shows its matrices with what they were multiplied with, lets the caller
change them, and moves the calibration inputs on to the next block. What the caller changed is what later blocks see;
a caller that changes nothing sees the dense model.

Three ways to move the inputs on. `block`, the papers': the statistics of a block come from its dense weights, then the
block runs again with the pruned ones. `sequential`: every matrix is shown just before its first use, in one pass.
`dense`: every block sees what it would see in the dense model, whatever is pruned before it, also in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.model.blocks import Block
from coprune.model.checkpoint.weights import Weights
from coprune.model.matrices import Matrix
from coprune.model.walk.inputs import Gathered, Inputs
from coprune.model.walk.lockstep import Lockstep
from coprune.model.walk.observe import Observe
from coprune.model.walk.paging import Paging
from coprune.model.walk.prove import Structure
from coprune.model.walk.record import run_after_blocks
from coprune.model.walk.recording import Recording
from coprune.model.walk.statistics import InputNorm

Propagation = Literal["block", "sequential", "dense"]
OUTSIDE = "outside"
"""In `Walk.known`, the matrices after the blocks."""


@dataclass(frozen=True)
class MatricesReady:
    """Matrices whose inputs are known, to be pruned (or looked at) now. Those of one event share their inputs."""

    matrices: list[Matrix]
    inputs: Inputs | None
    """None where no calibration data runs through the model."""


@dataclass(frozen=True)
class BlockDone:
    """All matrices of a block were shown; the block is let go of when the walk goes on."""

    block: Block


@dataclass
class Walk:
    """What a walk needs; iterate over it once."""

    weights: Weights
    blocks: Sequence[Block]
    matrices: Sequence[Sequence[Matrix]]
    statistic: type[InputNorm] | None = None
    """Which statistic to gather for every matrix; None for none (a sample of the inputs is kept all the same)."""
    structure: Structure | None = None
    recording: Recording | None = None
    """None: no data runs through the model; the blocks are shown one after another."""
    propagation: Propagation = "block"
    changes: bool = True
    """False for a caller that only looks: every block then runs once, as in `dense` propagation."""
    outside: Sequence[Matrix] = ()
    """Matrices after the blocks (lm_head), shown when the blocks are done."""
    finished: Container[str] = ()
    """Names of blocks that an earlier run finished: their inputs move on, but they are not shown."""
    restore: Callable[[Block], None] = lambda block: None
    """Gives a finished block its pruned weights."""
    known: Mapping[str, Callable[[], dict[str, Inputs]]] = field(default_factory=dict)
    """Reads what was gathered before of a block, by its name: the inputs of every group, by the group's first matrix.
    Such a block is not observed. Not in `sequential` propagation, nor for cross Gram matrices or several processes."""
    cross: bool = False
    """Whether to gather cross Gram matrices with the dense model's inputs (`recording.dense`; block propagation)."""
    keep_inputs: bool = False
    """Whether `recording.hidden` still holds a block's inputs at its BlockDone, for a caller that trains the block (not
    in `dense` propagation)."""
    need_outputs: bool = False
    """Whether the last block's outputs are wanted (in `recording.hidden`) when the walk ends."""
    reduce: Callable[[Inputs], None] = lambda inputs: None
    """Adds what other processes saw with their share of the samples; called once for all inputs, in the same order."""
    agree: Callable[[int | None], list[int]] = lambda position: [] if position is None else [position]
    """Tells which matrices the other processes would solve next (see `Lockstep`)."""
    advance: Callable[[float], None] = lambda blocks: None
    """Called with the share of a block that was done, for a progress bar."""

    def __iter__(self) -> Iterator[MatricesReady | BlockDone]:
        self._check_reuse()
        for block, following in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            self.weights.acquire(block.name)
            if following is not None:
                self.weights.expect(following.name)
            try:
                if block.name in self.finished:
                    self._pass(block)
                else:
                    yield from self._visit(block)
                    yield BlockDone(block)
                    if not self._sees_dense and (self.propagation == "block" or self.keep_inputs):
                        self._run(block, share=0.5)
            finally:
                self.weights.release(block.name)
        if self.outside:
            yield from self._visit_outside()

    @property
    def _sees_dense(self) -> bool:
        """Whether every block sees what it would see in the dense model, and so runs once, with its dense weights."""
        return not self.changes or self.propagation == "dense"

    def _pass(self, block: Block) -> None:
        """Move the inputs on through a finished block."""
        self._run_dense(block)
        if self._sees_dense:
            self._run(block, share=1.0)
        self.restore(block)
        if not self._sees_dense:
            self._run(block, share=1.0)

    def _check_reuse(self) -> None:
        if self.propagation == "sequential" and self.structure is not None and self.structure.reused:
            raise UnsupportedModel(
                f"{self.structure.reused[0]} is used more than once in a forward, so there is no moment just before its "
                "use; take --propagation block."
            )

    def _visit(self, block: Block) -> Iterator[MatricesReady]:
        known = block.name in self.known
        if self.structure is None or (self.recording is None and not known):
            yield from (MatricesReady([matrix], None) for matrix in self.matrices[block.index])
            self.advance(1.0)
            return
        gathered = self._gathered(block.name, self.structure.groups[block.index])
        if known:
            self._run_dense(block)
            if self._sees_dense:
                self._run(block, share=1.0)
            else:
                self.advance(0.5)
        elif self._sees_dense or self.propagation == "block":
            self._observe(block, gathered)
        else:
            self._run_dense(block)
            yield from self._visit_in_step(block, gathered)
        # In sequential mode, experts that no token was routed to; in the others, everything.
        yield from (MatricesReady(group, inputs) for group, inputs in gathered.take_all())

    def _observe(self, block: Block, gathered: Gathered) -> None:
        """Run a block with its dense weights on its inputs, and note what its matrices are multiplied with."""
        assert self.recording is not None
        for batch in range(len(self.recording.hidden)):
            gathered.dense = self._run_dense_batch(block, batch)
            with Observe(self.matrices[block.index], partial(gathered.see, batch)):
                output = self._run_batch(block, batch)
            if self._sees_dense:
                self.recording.hidden[batch] = output
            self.advance((1.0 if self._sees_dense else 0.5) / len(self.recording.hidden))

    def _visit_in_step(self, block: Block, gathered: Gathered) -> Iterator[MatricesReady]:
        assert self.recording is not None
        recording, hidden = self.recording, self.recording.hidden
        paging = None if hidden.spare is None else Paging(hidden.spare, hidden.folder)

        def run(batch: int) -> Tensor:
            # With a limit, the lane's own copy, which can be taken out of memory while the lane waits.
            own = hidden[batch] if paging is None else hidden[batch].clone()
            return recording.run(block, batch, own)

        def finish(batch: int, output: Tensor) -> None:
            if not self.keep_inputs:
                hidden[batch] = output
            self.advance((0.5 if self.keep_inputs else 1.0) / len(hidden))

        step = Lockstep(
            len(hidden),
            self.matrices[block.index],
            run,
            gathered.see,
            finish,
            self.agree,
            paging,
        )
        try:
            while (matrix := step.next_matrix()) is not None:
                group, inputs = gathered.take(matrix)
                yield MatricesReady(group, inputs)
                step.solved(group)
        finally:
            step.close()

    def _gathered(self, place: str, groups: Sequence[list[Matrix]]) -> Gathered:
        """Where the inputs of a place's groups are gathered: empty, unless they are known."""
        batches = 0 if self.recording is None else len(self.recording.hidden)
        known = self.known[place]() if place in self.known else {}
        return Gathered(groups, self.statistic, batches, self.reduce, known)

    def _run_dense(self, block: Block) -> None:
        """Move the dense model's hidden states on through the block, which still has its dense weights."""
        if self.recording is not None and self.recording.dense is not None:
            for batch in range(len(self.recording.dense)):
                self._run_dense_batch(block, batch)

    def _run_dense_batch(self, block: Block, batch: int) -> dict[str, Tensor]:
        """The same for one batch; returns what each matrix is multiplied with, if cross Gram matrices are wanted."""
        assert self.recording is not None
        seen: dict[str, Tensor] = {}
        if self.recording.dense is not None and (self.recording.aims is None or batch in self.recording.aims):
            matrices = [m for m in self.matrices[block.index] if m.expert is None] if self.cross else []
            with Observe(matrices, lambda matrix, x: seen.__setitem__(matrix.name, x)):
                self.recording.dense[batch] = self.recording.run(block, batch, self.recording.dense[batch])
        return seen

    def _run(self, block: Block, share: float) -> None:
        """Run a block as it is now on its inputs; its outputs become the next block's inputs."""
        last = block is self.blocks[-1]
        if self.recording is None or (last and not self.need_outputs and not self.outside):
            self.advance(share)
            return
        for batch in range(len(self.recording.hidden)):
            self.recording.hidden[batch] = self._run_batch(block, batch)
            self.advance(share / len(self.recording.hidden))

    def _visit_outside(self) -> Iterator[MatricesReady]:
        """Show the matrices after the blocks, with what the last block's outputs make of their inputs."""
        known = OUTSIDE in self.known
        if self.structure is None or (self.recording is None and not known):
            yield from (MatricesReady([matrix], None) for matrix in self.outside)
            return
        gathered = self._gathered(OUTSIDE, [[matrix] for matrix in self.outside])
        batches = (
            [] if known or self.recording is None else zip(self.recording.tokens, self.recording.hidden, strict=True)
        )
        for batch, (tokens, hidden) in enumerate(batches):
            with torch.no_grad(), Observe(self.outside, partial(gathered.see, batch)):
                run_after_blocks(self.weights.model, self.blocks, tokens, self.structure.answers, hidden)
        yield from (MatricesReady(group, inputs) for group, inputs in gathered.take_all())

    def _run_batch(self, block: Block, batch: int) -> Tensor:
        assert self.recording is not None
        return self.recording.run(block, batch, self.recording.hidden[batch])
