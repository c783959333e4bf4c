"""The walk: the only loop over blocks in the project.

A generator that takes up one block at a time, shows its matrices with what they were multiplied with, lets the caller
change them, and moves the calibration inputs on to the next block. What the caller changed is what later blocks see;
a caller that changes nothing sees the dense model.

Two ways to move the inputs on. `block`, the papers': the statistics of a block come from its dense weights, then the
block runs again with the pruned ones. `sequential`: every matrix is shown just before its first use, in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from coprune.checkpoint.weights import Weights
from coprune.errors import NumericalError, UnsupportedModel
from coprune.model.activations import Activations
from coprune.model.arguments import TensorPool
from coprune.model.blocks import Block
from coprune.model.lockstep import Lockstep
from coprune.model.matrices import Matrix
from coprune.model.observe import Observe
from coprune.model.prove import Structure
from coprune.model.record import BlockCall, run_after_blocks, run_without_blocks
from coprune.statistics import CrossGram, InputNorm, InputSample

Propagation = Literal["block", "sequential"]


@dataclass
class Inputs:
    """What is known of one tensor that feeds one or more matrices."""

    statistic: InputNorm | None
    sample: InputSample
    cross: CrossGram | None = None
    """With the same tokens' inputs in the dense model; None if not asked for, or for experts, whose tokens differ."""
    pool: InputNorm | None = None
    """For an expert: the statistic of all experts of its layer, as far as they are known."""

    def update(self, x: Tensor, x_dense: Tensor | None) -> None:
        self.sample.update(x)
        if self.statistic is not None:
            self.statistic.update(x)
        if x_dense is not None:
            self.cross = self.cross or CrossGram(self.sample.width, x.device)
            self.cross.update(x_dense, x)


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
class Recording:
    """The calibration batches on their way: the inputs of the next block, and every block's calls.

    tokens: B × S int64 per batch; hidden: B × S × H per batch; calls: per batch, per block; dense: like hidden, but what
    the blocks of the dense model would be given, if somebody aims at those.
    """

    tokens: list[Tensor]
    hidden: Activations
    calls: list[list[BlockCall]]
    dense: Activations | None = None

    @torch.no_grad()
    def run(self, block: Block, batch: int, hidden: Tensor) -> Tensor:
        """Run a block on hidden states of a batch (B × S × H) with that batch's own arguments."""
        return self.calls[batch][block.index].run(block.module, hidden)


@torch.no_grad()
def record_batches(
    model: nn.Module,
    blocks: Sequence[Block],
    structure: Structure,
    batches: Sequence[Tensor],
    activations: Activations | None = None,
) -> Recording:
    """Run every batch through the model with idle blocks.

    batches: B × S int64 each; activations: an empty list for the hidden states (default: one in memory).
    """
    pool = TensorPool()
    recording = Recording([], Activations() if activations is None else activations, [])
    for tokens in batches:
        hidden, calls = run_without_blocks(model, blocks, tokens, structure.answers)
        recording.tokens.append(tokens)
        recording.hidden.append(hidden)
        recording.calls.append([BlockCall(pool.share(c.args), pool.share(c.kwargs), c.keyword) for c in calls])
        pool.forget_batch()
    return recording


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
    """False for a caller that only looks: the block then runs once."""
    outside: Sequence[Matrix] = ()
    """Matrices after the blocks (lm_head), shown when the blocks are done."""
    finished: Container[str] = ()
    """Names of blocks that an earlier run finished: their inputs move on, but they are not shown."""
    restore: Callable[[Block], None] = lambda block: None
    """Gives a finished block its pruned weights."""
    cross: bool = False
    """Whether to gather cross Gram matrices with the dense model's inputs (`recording.dense`; block propagation)."""
    keep_inputs: bool = False
    """Whether `recording.hidden` still holds a block's inputs at its BlockDone, for a caller that trains the block."""
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
        for block in self.blocks:
            self.weights.acquire(block.name)
            try:
                if block.name in self.finished:
                    self._run_dense(block)
                    self.restore(block)
                    self._run_again(block, share=1.0)
                else:
                    yield from self._visit(block)
                    yield BlockDone(block)
                    if self.changes and (self.propagation == "block" or self.keep_inputs):
                        self._run_again(block, share=0.5)
            finally:
                self.weights.release(block.name)
        if self.outside:
            yield from self._visit_outside()

    def _check_reuse(self) -> None:
        if self.propagation == "sequential" and self.structure is not None and self.structure.reused:
            raise UnsupportedModel(
                f"{self.structure.reused[0]} is used more than once in a forward, so there is no moment just before its "
                "use; take --propagation block."
            )

    def _visit(self, block: Block) -> Iterator[MatricesReady]:
        matrices = self.matrices[block.index]
        if self.recording is None or self.structure is None:
            yield from (MatricesReady([matrix], None) for matrix in matrices)
            self.advance(1.0)
            return
        gathered = self._gathered(self.structure.groups[block.index], len(self.recording.hidden))
        if self.propagation == "sequential" and self.changes:
            self._run_dense(block)
            yield from self._visit_in_step(block, gathered)
        else:
            for batch in range(len(self.recording.hidden)):
                gathered.dense = self._run_dense_batch(block, batch)
                with Observe(matrices, partial(gathered.see, batch)):
                    output = self._run(block, batch)
                if not self.changes:
                    self.recording.hidden[batch] = output
                self.advance((0.5 if self.changes else 1.0) / len(self.recording.hidden))
            yield from (MatricesReady(group, inputs) for group, inputs in gathered.take_all())
        # Experts that no token was routed to in sequential mode; in block mode none are left.
        yield from (MatricesReady(group, inputs) for group, inputs in gathered.take_all())

    def _visit_in_step(self, block: Block, gathered: _Gathered) -> Iterator[MatricesReady]:
        assert self.recording is not None
        hidden = self.recording.hidden

        def finish(batch: int, output: Tensor) -> None:
            if not self.keep_inputs:
                hidden[batch] = output
            self.advance((0.5 if self.keep_inputs else 1.0) / len(hidden))

        step = Lockstep(
            len(hidden),
            self.matrices[block.index],
            lambda batch: self._run(block, batch),
            gathered.see,
            finish,
            self.agree,
        )
        while (matrix := step.next_matrix()) is not None:
            group, inputs = gathered.take(matrix)
            yield MatricesReady(group, inputs)
            step.solved(group)

    def _gathered(self, groups: Sequence[list[Matrix]], batches: int) -> _Gathered:
        return _Gathered(groups, self.statistic, batches, self.reduce)

    def _run_dense(self, block: Block) -> None:
        """Move the dense model's hidden states on through the block, which still has its dense weights."""
        if self.recording is not None and self.recording.dense is not None:
            for batch in range(len(self.recording.dense)):
                self._run_dense_batch(block, batch)

    def _run_dense_batch(self, block: Block, batch: int) -> dict[str, Tensor]:
        """The same for one batch; returns what each matrix is multiplied with, if cross Gram matrices are wanted."""
        assert self.recording is not None
        seen: dict[str, Tensor] = {}
        if self.recording.dense is not None:
            matrices = [m for m in self.matrices[block.index] if m.expert is None] if self.cross else []
            with Observe(matrices, lambda matrix, x: seen.__setitem__(matrix.name, x)):
                self.recording.dense[batch] = self.recording.run(block, batch, self.recording.dense[batch])
        return seen

    def _run_again(self, block: Block, share: float) -> None:
        """Run a block that has its final weights on its inputs; its outputs become the next block's inputs."""
        last = block is self.blocks[-1]
        if self.recording is None or (last and not self.need_outputs and not self.outside):
            self.advance(share)
            return
        for batch in range(len(self.recording.hidden)):
            self.recording.hidden[batch] = self._run(block, batch)
            self.advance(share / len(self.recording.hidden))

    def _visit_outside(self) -> Iterator[MatricesReady]:
        """Show the matrices after the blocks, with what the last block's outputs make of their inputs."""
        if self.recording is None or self.structure is None:
            yield from (MatricesReady([matrix], None) for matrix in self.outside)
            return
        gathered = self._gathered([[matrix] for matrix in self.outside], len(self.recording.hidden))
        model = self.weights.model
        for batch, (tokens, hidden) in enumerate(zip(self.recording.tokens, self.recording.hidden, strict=True)):
            with torch.no_grad(), Observe(self.outside, partial(gathered.see, batch)):
                run_after_blocks(model, self.blocks, tokens, self.structure.answers, hidden)
        yield from (MatricesReady(group, inputs) for group, inputs in gathered.take_all())

    def _run(self, block: Block, batch: int) -> Tensor:
        assert self.recording is not None
        return self.recording.run(block, batch, self.recording.hidden[batch])


class _Gathered:
    """The inputs of one block's groups of matrices while its batches run."""

    def __init__(
        self,
        groups: Sequence[list[Matrix]],
        statistic: type[InputNorm] | None,
        batches: int,
        reduce: Callable[[Inputs], None],
    ) -> None:
        self._groups = {group[0].name: group for group in groups}
        self._leader = {matrix.name: group[0].name for group in groups for matrix in group}
        self._statistic = statistic
        self._batches = batches
        self._reduce = reduce
        self._inputs: dict[str, Inputs] = {}
        self._complete: set[str] = set()
        self._pools: dict[str, InputNorm] = {}
        self.dense: dict[str, Tensor] = {}
        """What the matrices of the batch at hand are multiplied with in the dense model, by name."""

    def see(self, batch: int, matrix: Matrix, x: Tensor) -> None:
        """Note one product. The first matrix of a group speaks for all of them."""
        leader = self._leader[matrix.name]
        if leader != matrix.name:
            return
        try:
            self._of(leader, x.shape[-1], x.device).update(x, self.dense.get(leader))
        except NumericalError as error:
            raise NumericalError(f"{matrix.name}, calibration batch {batch}: {error}.") from error

    def _of(self, leader: str, width: int, device: torch.device) -> Inputs:
        if leader not in self._inputs:
            statistic = None if self._statistic is None else self._statistic(width, device)
            self._inputs[leader] = Inputs(statistic, InputSample(width, self._batches, device))
        return self._inputs[leader]

    def take(self, matrix: Matrix) -> tuple[list[Matrix], Inputs]:
        """Hand out a group and what was gathered for it, and forget it."""
        leader = self._leader[matrix.name]
        self._finish(leader)
        return self._groups.pop(leader), self._inputs.pop(leader)

    def take_all(self) -> Iterator[tuple[list[Matrix], Inputs]]:
        """Hand out all groups that are left, in order."""
        # All of them are complete before the first is shown, so that every expert knows its whole layer.
        for leader in self._groups:
            self._finish(leader)
        while self._groups:
            yield self.take(next(iter(self._groups.values()))[0])

    def _finish(self, leader: str) -> None:
        """Complete the inputs of a group, to which nothing will be added any more."""
        if leader in self._complete:
            return
        matrix = self._groups[leader][0]
        inputs = self._of(leader, matrix.shape[1], matrix.stored().device)
        self._reduce(inputs)
        if matrix.expert is not None and inputs.statistic is not None:
            inputs.pool = self._pool_of(matrix, inputs.statistic)
        self._complete.add(leader)

    def _pool_of(self, matrix: Matrix, statistic: InputNorm) -> InputNorm:
        """The merged statistic of the experts that share this one's parameter.

        In `block` propagation it holds all of them by the time that the first is shown. In `sequential` those further
        on are not known yet: an expert's pool is then of itself and the experts before it.
        """
        layer = matrix.name.partition("[")[0]
        if layer not in self._pools:
            self._pools[layer] = type(statistic)(matrix.shape[1], matrix.stored().device)
        self._pools[layer].merge(statistic)
        return self._pools[layer]
