"""Blocks that go as one linear map (ReplaceMe, arXiv 2505.02819), merged into what the block before them adds to its input.

Of a span of blocks, the best linear map from what that block adds to what the span would have made of it is solved from sums
over tokens. No names are used: which matrices of a block only add to its output is proven by changing them.
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
"""Share of zeros from which on a matrix counts as pruned, which a map would fill. Rounding to four bits makes a tenth."""


@dataclass(frozen=True, order=True)
class Span:
    """Consecutive blocks that go, and the block before them, which gets their map."""

    before: int
    """Number of that block."""
    count: int
    """Number of blocks that go."""

    @property
    def gone(self) -> range:
        """Numbers of the blocks that go."""
        return range(self.before + 1, self.last + 1)

    @property
    def last(self) -> int:
        """Number of the last of them."""
        return self.before + self.count


def spans_of(dropped: Collection[int], mapped: Collection[int]) -> list[Span]:
    """Return the spans behind some blocks.

    Args:
        dropped: numbers of all blocks that go.
        mapped: numbers of the blocks that get a map.
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
    """A map of a span."""

    change: Tensor
    """K × H float32: what is added to the block's output for what its matrices write (K = H), or for the only one's inputs."""
    of_inputs: bool
    error: float
    """Mean over tokens of the squared error behind the span relative to the hidden state before it."""


@dataclass(frozen=True)
class Writers:
    """Matrices of a block whose outputs are only added to the block's own, in any number of steps."""

    matrices: tuple[Matrix, ...]

    @property
    def is_one(self) -> bool:
        """Whether it is one matrix, which has inputs of every token."""
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
        """Yield views of the weights as they are stored, and of the biases."""
        for matrix in self.matrices:
            yield matrix.stored()
            if (bias := bias_of(matrix)) is not None:
                yield bias

    @torch.no_grad()
    def silence(self) -> None:
        """Let them write nothing, in place."""
        for tensor in self.tensors():
            tensor.zero_()

    @torch.no_grad()
    def rewrite(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the weights and biases in place. change: of O × N float32, whose rows are outputs."""
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
        """Hold a map merged in the body."""
        with self.put_back():
            self.merge(mapped)
            yield


@dataclass(frozen=True)
class FoundMap:
    """A map that waits until the block that gets it is loaded."""

    writers: Writers
    map: Map

    def merge(self, processes: Processes) -> None:
        """Merge the map into the block's weights, in place; those of the first process are those of all."""
        self.writers.merge(self.map)
        processes.broadcast([(tensor, 0) for tensor in self.writers.tensors()])


def find_writers(model: ProvenModel) -> dict[int, Writers]:
    """Find the matrices of every block that only add to its output, proven on a short sample; by the block's number.

    They are the down projections of most models, also of experts, and where attention and MLP read one input, both last
    projections. A norm behind a matrix, or a scale that differs by channel, makes a block have none.
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
    """Return a block's chosen matrices, with the experts of one parameter together."""
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
    """Return whether the block's output follows when the outputs of some matrices are exchanged and scaled."""
    before, width = done.before[0], done.after[0].shape[-1]
    if done.after[0].shape != before.shape or any(matrix.shape[0] != width for matrix in writers.matrices):
        return False
    generator = torch.Generator().manual_seed(0)
    # Different powers of two, exact in every dtype: a norm behind the matrix, which permutations alone pass, changes with them.
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
    """What a block's matrices write, or the inputs of the only one, from which the maps of spans behind it are solved.

    T tokens per batch, K features, H hidden values. Every token's weight is one over the squared size of its hidden state, by
    which the next norm divides.
    """

    rows: Sequence[Tensor]
    """T × K per batch, of any dtype."""
    start: Sequence[Tensor]
    """T × H per batch: the block's output."""
    gram: Tensor
    """K × K float32: weighted sum over the tokens of all processes."""
    lower: Tensor
    """K × K float32: the damped Gram matrix's factor."""
    count: int
    """Tokens of all processes."""

    @classmethod
    def of(cls, rows: Sequence[Tensor], start: Sequence[Tensor], processes: Processes = ALONE) -> Features:
        """Add the tokens up.

        Args:
            rows: T × K per batch, of at least one (perhaps without tokens).
            start: T × H per batch.
            processes: those that have other batches of the same.

        Raises:
            NumericalError: they are not finite.
        """
        width = rows[0].shape[1]
        gram = torch.zeros(width, width, device=rows[0].device)
        with full_float32():
            for own, hidden in zip(rows, start, strict=True):
                weighted = own.to(torch.float32) * _weights(hidden)
                gram += weighted.T @ weighted
            count = processes.add_up([gram], sum(map(len, start)))
            # What few tokens say of many features is mostly noise. Damping draws the map toward none.
            lower, _ = damped_cholesky(gram, max(_LEAST_DAMPING, width / max(count, 1)))
        return cls(rows, start, gram, lower, count)

    def solve(self, end: Sequence[Tensor], of_inputs: bool = False, processes: Processes = ALONE) -> Map:
        """Solve the map of a span.

        Args:
            end: T × H per batch, the hidden states behind the span.
            of_inputs: what the features are.
            processes: as of `of`.
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
    """Walks of batches over the dense model that solve maps."""

    model: ProvenModel
    writers: Mapping[int, Writers]
    """Of the blocks that may get a map, by number."""
    batches: Sequence[Tensor]
    """This process's, as in `record_batches`."""
    processes: Processes = ALONE

    @torch.no_grad()
    def of_outputs(self, spans: Collection[Span], advance: Advance = lambda share: None) -> Iterator[tuple[Span, Map]]:
        """Yield the maps of what blocks write, each as soon as the end of its span is reached, for many spans in one walk.

        advance: called with the share of a block that was done.
        """
        open_ones = dict[int, Features]()
        recording, shown = record_batches(self.model, self.batches), self._up_to(max(span.last for span in spans))
        for event in Walk(shown, recording, moves=Dense(keep=Tensor.clone), advance=advance):
            if not isinstance(event, BlockDone):
                continue
            index, after = event.block.index, self._tokens(event.after)
            for span in sorted(span for span in spans if span.last == index):
                yield span, open_ones[span.before].solve(after, processes=self.processes)
            needed = {span.before for span in spans if span.before <= index < span.last}
            open_ones = {before: own for before, own in open_ones.items() if before in needed}
            if index in needed:
                states = enumerate(zip(event.before, event.after, strict=True))
                written = [self._written(recording, event.block, batch, *own) for batch, own in states]
                open_ones[index] = self._features(event.block, written, [hidden.clone() for hidden in after])

    @torch.no_grad()
    def merged(self, spans: Sequence[Span], advance: Advance = lambda share: None) -> dict[int, FoundMap]:
        """Return the maps of spans that all go, by the number of the block that gets one.

        The only matrix of a block that writes is fitted anew on its inputs, which is closer than a map of its outputs. Later
        spans see what the earlier maps leave, and aim at the dense model. advance: as of `of_outputs`.
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
        """Return hidden states token by token; an empty batch where this process has none."""
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
        """Return what a block's matrices write for a batch: T × H."""
        own = self.writers[block.index]
        with own.put_back():
            own.silence()
            written: Tensor = after - recording.run(block, batch, before)
        return written.flatten(0, -2)

    def _inputs(self, recording: Recording, block: Block, batch: int, before: Tensor) -> Tensor:
        """Return the inputs of the only matrix of a block that writes, for a batch: T × I."""
        seen: list[Tensor] = []
        with Observe(self.writers[block.index].matrices, lambda _, x: seen.append(x.flatten(0, -2).clone())):
            recording.run(block, batch, before)
        return seen[0]


def best_sets(errors: Mapping[Span, float], count: int, spans: int, each: int) -> list[tuple[Span, ...]]:
    """Return the sets of spans whose errors add up to the least.

    Args:
        errors: of the spans.
        count: number of blocks that a set removes.
        spans: most spans of a set.
        each: number of sets of as many spans.

    Returns:
        Those of one span first. A block that gets a map stays.
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
