"""Blocks replaced by one linear map (ReplaceMe, arXiv 2505.02819), merged into the output of the block before them.

For a span of blocks, the best linear map from what that block adds to what the span would have produced is solved from
sums over tokens. No names are used: which matrices only add to a block's output is proven by changing them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import nsmallest

import torch
from torch import Tensor

from coprune.base.errors import NumericalError
from coprune.base.precision import full_float32, held_in_float32
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Advance, scaled
from coprune.model.blocks import Block
from coprune.model.folding import bias_of, distances
from coprune.model.matrices import Matrix
from coprune.model.proven_folds import first_tokens
from coprune.model.walk.block_calls import input_device
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.observe import Observe
from coprune.model.walk.recording import Dense, Recording, record_batches
from coprune.model.walk.walk import Walk
from coprune.pruning.linear_algebra import damped_cholesky

_LEAST_DAMPING = 0.01
_TINY = 1e-12
_MOST_ZEROS = 0.25
"""Share of zeros above which a matrix counts as pruned, since a map would fill them; rounding to four bits makes a tenth."""


@dataclass(frozen=True, order=True)
class Span:
    """Consecutive blocks to remove, and the block before them, which absorbs their map."""

    before: int
    """Number of that block."""
    count: int
    """Number of removed blocks."""

    @property
    def gone(self) -> range:
        """Numbers of the removed blocks."""
        return range(self.before + 1, self.last + 1)

    @property
    def last(self) -> int:
        """Number of the last removed block."""
        return self.before + self.count


def spans_of(dropped: Collection[int], mapped: Collection[int]) -> list[Span]:
    """Return the spans of a removal.

    Args:
        dropped: numbers of all removed blocks.
        mapped: numbers of the blocks that absorb a map.
    """
    spans = []
    for before in sorted(mapped):
        last = before
        while last + 1 in dropped:
            last += 1
        spans.append(Span(before, last - before))
    return spans


@dataclass(frozen=True)
class Map:
    """The linear map of a span."""

    change: Tensor
    """K × H float32: the change of the output, from what the matrices write (K = H) or from the single matrix's inputs."""
    of_inputs: bool
    error: float
    """Mean over tokens of the squared error after the span, relative to the hidden state before it."""


@dataclass(frozen=True)
class Writers:
    """Matrices of a block whose outputs are only added to the block's output, possibly in several steps."""

    matrices: tuple[Matrix, ...]

    @property
    def is_one(self) -> bool:
        """Whether it is a single matrix that sees every token."""
        return len(self.matrices) == 1 and self.matrices[0].expert is None

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Restore the matrices and their biases at the end of the body."""
        before = [(tensor, tensor.clone()) for tensor in self.tensors()]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, values in before:
                    tensor.copy_(values)

    def tensors(self) -> Iterator[Tensor]:
        """Yield views of the stored weights and biases."""
        for matrix in self.matrices:
            yield matrix.stored()
            if (bias := bias_of(matrix)) is not None:
                yield bias

    @torch.no_grad()
    def silence(self) -> None:
        """Zero the matrices and their biases in place, so that they write nothing."""
        for tensor in self.tensors():
            tensor.zero_()

    @torch.no_grad()
    def rewrite(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the weights and biases in place. change: applied to O × N float32, whose rows are outputs."""
        with full_float32():
            for matrix in self.matrices:
                matrix.write(change(matrix.read()))
                if (bias := bias_of(matrix)) is not None:
                    bias.copy_(change(bias.to(torch.float32)[:, None])[:, 0])

    @torch.no_grad()
    def merge(self, mapped: Map) -> None:
        """Merge a map into the weights, in place."""
        change = mapped.change.T.to(self.matrices[0].stored().device)
        if mapped.of_inputs:
            (matrix,) = self.matrices
            matrix.write(matrix.read() + change)
        else:
            self.rewrite(lambda rows: rows + change @ rows)

    @contextmanager
    def merged(self, mapped: Map) -> Iterator[None]:
        """Merge a map within the body."""
        with self.put_back():
            self.merge(mapped)
            yield


@dataclass(frozen=True)
class FoundMap:
    """A map to merge as soon as its block is loaded."""

    writers: Writers
    map: Map

    def merge(self, processes: Processes) -> None:
        """Merge the map into the block's weights, in place on the first process, and broadcast them."""
        self.writers.merge(self.map)
        processes.broadcast([(tensor, 0) for tensor in self.writers.tensors()])


def find_writers(model: ProvenModel) -> dict[int, Writers]:
    """Find, by block number, the matrices that only add to the block's output, proven on a short sample.

    These are the down projections of most models, of experts too, and both last projections where attention and MLP read
    the same input. A norm after the matrix, or a scale per channel, rules a block out.
    """
    recording, found = record_batches(model, [first_tokens(model.structure.sample)]), dict[int, Writers]()
    for event in Walk(model.idle(), recording, None, Dense(keep=Tensor.clone)):
        if isinstance(event, BlockDone):
            units = _units(model, event.block)
            writers = [unit for unit in units if _only_adds(Writers(tuple(unit)), recording, event)]
            if writers:
                found[event.block.index] = Writers(tuple(matrix for unit in writers for matrix in unit))
    return found


def _units(model: ProvenModel, block: Block) -> list[list[Matrix]]:
    """Group a block's chosen matrices; experts in one parameter stay together."""
    units: dict[str, list[Matrix]] = {}
    for group in model.structure.groups[block.index]:
        for matrix in group:
            if matrix.name not in model.structure.reused:
                units.setdefault(matrix.parameter, []).append(matrix)
    return [unit for unit in units.values() if not any(_is_pruned(matrix) for matrix in unit)]


def _is_pruned(matrix: Matrix) -> bool:
    return matrix.zeros() > _MOST_ZEROS * matrix.stored().numel()


@torch.no_grad()
def _only_adds(writers: Writers, recording: Recording, done: BlockDone) -> bool:
    """Return whether permuting and scaling the matrices' outputs does the same to the block's output change."""
    before, width = done.before[0], done.after[0].shape[-1]
    if done.after[0].shape != before.shape or any(matrix.shape[0] != width for matrix in writers.matrices):
        return False
    generator = torch.Generator().manual_seed(0)
    # Distinct powers of two are exact in every dtype; a norm after the matrix, blind to permutations, changes with them.
    scales = (2.0 ** torch.randint(-1, 2, (width,), generator=generator)).to(before.device)
    order = torch.randperm(width, generator=generator).to(before.device)

    def run() -> Tensor:
        return recording.run_in_float32(done.block, 0, before.to(torch.float32))

    with full_float32(), held_in_float32(done.block.module):
        whole = run()
        with writers.put_back():
            writers.rewrite(lambda rows: rows[order] * scales[:, None])
            other = run()
            writers.silence()
            rest = run()
        apart, norms = distances(other - rest, (whole - rest)[..., order] * scales)
    _, sizes = distances(whole, whole)
    return bool((norms > 1e-4 * sizes).any() and (apart <= 1e-3 * norms + 1e-5 * sizes).all())


@dataclass(frozen=True)
class Features:
    """Outputs of a block's matrices, or inputs of its single one, from which maps of the spans behind it are solved.

    T tokens per batch, K features, H hidden values. Each token is weighted by one over the squared norm of its hidden
    state, since the next norm divides by it.
    """

    rows: Sequence[Tensor]
    """T × K per batch, of any dtype."""
    start: Sequence[Tensor]
    """T × H per batch: the block's outputs."""
    gram: Tensor
    """K × K float32: weighted sum over the tokens of all processes."""
    lower: Tensor
    """K × K float32: Cholesky factor of the damped Gram matrix."""
    count: int
    """Number of tokens over all processes."""

    @classmethod
    def of(cls, rows: Sequence[Tensor], start: Sequence[Tensor], processes: Processes = ALONE) -> Features:
        """Sum the features over tokens.

        Args:
            rows: T × K per batch, at least one batch, which may have no tokens.
            start: T × H per batch.
            processes: all that hold batches of the same data.

        Raises:
            NumericalError: the values are not finite.
        """
        width = rows[0].shape[1]
        gram = torch.zeros(width, width, device=rows[0].device)
        with full_float32():
            for own, hidden in zip(rows, start, strict=True):
                weighted = own.to(torch.float32) * _weights(hidden)
                gram += weighted.T @ weighted
            count = processes.add_up([gram], sum(map(len, start)))
            # Few tokens and many features give mostly noise; damping draws the map toward no change.
            lower, _ = damped_cholesky(gram, max(_LEAST_DAMPING, width / max(count, 1)))
        return cls(rows, start, gram, lower, count)

    def solve(self, end: Sequence[Tensor], of_inputs: bool = False, processes: Processes = ALONE) -> Map:
        """Solve the map of a span.

        Args:
            end: T × H per batch, the hidden states after the span.
            of_inputs: whether the features are inputs of the single matrix.
            processes: as in `of`.
        """
        cross, moved = self.gram.new_zeros(len(self.gram), end[0].shape[1]), self.gram.new_zeros(1)
        with full_float32():
            for rows, hidden, behind in zip(self.rows, self.start, end, strict=True):
                weights = _weights(hidden)
                added = (behind.to(torch.float32) - hidden.to(torch.float32)) * weights
                cross += (rows.to(torch.float32) * weights).T @ added
                moved += added.square().sum()
            processes.add_up([cross, moved], 0)
            change = torch.cholesky_solve(cross, self.lower)
            explained = 2 * (cross * change).sum() - (change * (self.gram @ change)).sum()
        return Map(change, of_inputs, float(moved - explained) / max(self.count, 1))


def _weights(hidden: Tensor) -> Tensor:
    norms: Tensor = hidden.to(torch.float32).norm(dim=1, keepdim=True)
    return norms.clamp_min(_TINY).reciprocal()


@dataclass(frozen=True)
class MapWalk:
    """Runs of the dense model over batches, from which maps are solved."""

    model: ProvenModel
    writers: Mapping[int, Writers]
    """Matrices of the blocks that may absorb a map, by block number."""
    batches: Sequence[Tensor]
    """Batches of this process, as in `record_batches`."""
    processes: Processes = ALONE

    @torch.no_grad()
    def of_outputs(
        self, spans: Collection[Span], advance: Advance = lambda share: None, of_inputs: bool = False
    ) -> Iterator[tuple[Span, Map]]:
        """Yield maps of block outputs for many spans in one walk, each as soon as the walk reaches the end of its span.

        Args:
            spans: the spans.
            advance: called with the share of a block just done.
            of_inputs: whether single matrices are refitted on their inputs instead, as `merged` does.
        """
        open_ones = dict[int, Features]()
        recording, shown = record_batches(self.model, self.batches), self._up_to(max(span.last for span in spans))
        for event in Walk(shown, recording, moves=Dense(keep=Tensor.clone), advance=advance):
            if not isinstance(event, BlockDone):
                continue
            index, after = event.block.index, self._tokens(event.after)
            for span in sorted(span for span in spans if span.last == index):
                fits = of_inputs and self.writers[span.before].is_one
                yield span, open_ones[span.before].solve(after, fits, self.processes)
            needed = {span.before for span in spans if span.before <= index < span.last}
            open_ones = {before: own for before, own in open_ones.items() if before in needed}
            if index in needed:
                fits, states = of_inputs and self.writers[index].is_one, zip(event.before, event.after, strict=True)
                rows = [
                    self._inputs(recording, event.block, batch, before)
                    if fits
                    else self._written(recording, event.block, batch, before, behind)
                    for batch, (before, behind) in enumerate(states)
                ]
                open_ones[index] = self._features(event.block, rows, [hidden.clone() for hidden in after], fits)

    @torch.no_grad()
    def merged(self, spans: Sequence[Span], advance: Advance = lambda share: None) -> dict[int, FoundMap]:
        """Return the maps of spans that are all removed, by the number of the block that absorbs each.

        A block's single writing matrix is refitted on its inputs, which is more accurate than a map of its outputs. Later
        spans see the effect of earlier maps and aim at the dense model. advance: as in `of_outputs`.
        """
        ends, found = dict[int, list[Tensor]](), dict[int, FoundMap]()
        recording = record_batches(self.model, self.batches)
        way, lasts = recording.apart(), {span.last for span in spans}
        for event in Walk(self._up_to(max(lasts)), recording, moves=Dense(), advance=scaled(advance, 0.5)):
            if isinstance(event, BlockDone) and event.block.index in lasts:
                ends[event.block.index] = [hidden.clone() for hidden in self._tokens(event.after)]
        befores, gone = {span.before: span for span in spans}, {index for span in spans for index in span.gone}
        for event in Walk(self._up_to(max(befores))):
            if not isinstance(event, BlockDone):
                continue
            block = event.block
            way.go_past(self.model, block, runs=False)
            before = [*way.hidden]
            for batch in range(len(before) if block.index not in gone else 0):
                way.move(block, batch)
            advance(0.5)
            if (span := befores.get(block.index)) is None:
                continue
            own = self.writers[block.index]
            rows = [
                self._inputs(way, block, batch, hidden)
                if own.is_one
                else self._written(way, block, batch, hidden, way.hidden[batch])
                for batch, hidden in enumerate(before)
            ]
            features = self._features(block, rows, self._tokens(way.hidden), own.is_one)
            found[block.index] = FoundMap(own, features.solve(ends[span.last], own.is_one, self.processes))
            with own.merged(found[block.index].map):
                for batch, hidden in enumerate(before):
                    way.hidden[batch] = way.run(block, batch, hidden)
        return found

    def _up_to(self, last: int) -> ProvenModel:
        return self.model.idle().first_blocks(last + 1, outside=False)

    def _tokens(self, hidden: Iterable[Tensor]) -> list[Tensor]:
        """Flatten hidden states to tokens; one empty batch if this process has none."""
        width = next(iter(self.writers.values())).matrices[0].shape[0]
        return [own.flatten(0, -2) for own in hidden] or [self._none(width)]

    def _none(self, width: int) -> Tensor:
        return torch.zeros(0, width, device=input_device(self.model.module))

    def _features(self, block: Block, rows: list[Tensor], start: list[Tensor], of_inputs: bool = False) -> Features:
        outputs, inputs = self.writers[block.index].matrices[0].shape
        try:
            return Features.of(rows or [self._none(inputs if of_inputs else outputs)], start, self.processes)
        except NumericalError as error:
            raise error.within(block.name) from error

    def _written(self, recording: Recording, block: Block, batch: int, before: Tensor, after: Tensor) -> Tensor:
        """Return the output of a block's matrices for a batch: T × H."""
        own = self.writers[block.index]
        with own.put_back():
            own.silence()
            written: Tensor = after - recording.run(block, batch, before)
        return written.flatten(0, -2)

    def _inputs(self, recording: Recording, block: Block, batch: int, before: Tensor) -> Tensor:
        """Return the inputs of a block's single writing matrix for a batch: T × I."""
        seen: list[Tensor] = []
        with Observe(self.writers[block.index].matrices, lambda _, x: seen.append(x.flatten(0, -2).clone())):
            recording.run(block, batch, before)
        return seen[0]


def best_sets(errors: Mapping[Span, float], count: int, spans: int, each: int) -> list[tuple[Span, ...]]:
    """Return the sets of spans with the smallest total errors.

    Args:
        errors: error of each span.
        count: number of blocks that a set removes.
        spans: maximum number of spans in a set.
        each: number of sets for each number of spans.

    Returns:
        Sets of one span first. A block that absorbs a map is never removed.
    """
    sets = {-1: {(0, 0): [(0.0, tuple[Span, ...]())]}}
    for last in range(1 + max((span.last for span in errors), default=-1)):
        own = {key: [*found] for key, found in sets[last - 1].items()}
        for span in (one for one in errors if one.last == last):
            for (number, gone), before in sets[span.before - 1].items():
                if number < spans and gone + span.count <= count:
                    more = [(cost + errors[span], (*known, span)) for cost, known in before]
                    own.setdefault((number + 1, gone + span.count), []).extend(more)
        sets[last] = {key: nsmallest(each, found) for key, found in own.items()}
    every = sets[max(sets)]
    return [known for number in range(1, spans + 1) for _, known in every.get((number, count), ())]
