"""Scores of blocks: how much a block changes its input, or how far the model's output moves without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from coprune.base.errors import UnsupportedModel
from coprune.base.memory import return_free_memory
from coprune.base.method_options import one_of, require_not_negative, require_positive
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Advance, scaled
from coprune.model.blocks import Block, by_list
from coprune.model.walk.block_calls import run_after_blocks
from coprune.model.walk.block_events import BlockDone
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.recording import Dense, Recording, record_batches
from coprune.model.walk.walk import Walk
from coprune.recipe.choice import Choice
from coprune.recipe.structure import COMPARED_BY_KL, KL_ROWS, MAP_CANDIDATES, MAP_SPANS, MAP_TOKENS
from coprune.removal.maps import Map, MapWalk, Span, Writers, best_sets, find_writers
from coprune.run.calibrating import first_batches


@dataclass(frozen=True)
class Going:
    """Blocks to remove."""

    blocks: list[int]
    """Their numbers, in order of removal; only of `may_go`."""
    mapped: Sequence[int] = ()
    """Numbers of the blocks that absorb the linear map of the blocks removed right after them."""


class BlockScore(Protocol):
    """A way of choosing the blocks to remove."""

    def choose(
        self,
        model: ProvenModel,
        batches: Sequence[Tensor],
        counts: Sequence[int],
        advance: Advance = lambda share: None,
        processes: Processes = ALONE,
    ) -> Going:
        """Choose the blocks to remove.

        Args:
            model: the dense model; restored at the end.
            batches: calibration batches, as in `record_batches`.
            counts: number of blocks to remove from each list (the encoder's, the decoder's).
            advance: called with the share of the work just done.
            processes: all that choose together, each with the whole model and all batches.

        Raises:
            UnsupportedModel: the model lacks what the score needs.
        """
        ...


def may_go(model: ProvenModel) -> list[list[int]]:
    """Return the removable blocks of each list: those with a selected matrix and no later block that reads their results."""
    stay = model.chosen.untouched() | model.structure.producers
    return [[block.index for block in own if block.index not in stay] for own in by_list(model.blocks)]


@dataclass(frozen=True)
class Influence:
    """Remove the blocks that change the direction of their inputs least (ShortGPT, arXiv 2403.03853)."""

    def choose(
        self,
        model: ProvenModel,
        batches: Sequence[Tensor],
        counts: Sequence[int],
        advance: Advance = lambda share: None,
        processes: Processes = ALONE,
    ) -> Going:
        found = influences(model, batches, advance, processes)
        least = (sorted(own, key=found.__getitem__)[:n] for own, n in zip(may_go(model), counts, strict=True))
        return Going(sorted(chain.from_iterable(least), key=found.__getitem__))


@dataclass(frozen=True)
class Divergence:
    """Remove blocks one by one, each time the one whose removal moves the model's distributions least from the dense model's.

    After the first round only the best candidates of the previous round are tried again.
    """

    tokens: int = COMPARED_BY_KL
    """Minimum number of calibration tokens to use (for image models: one batch)."""
    candidates: int = 6
    """Number of blocks tried again after each removal; 0: all."""

    def __post_init__(self) -> None:
        require_positive(tokens=self.tokens)
        require_not_negative(candidates=self.candidates)

    def choose(
        self,
        model: ProvenModel,
        batches: Sequence[Tensor],
        counts: Sequence[int],
        advance: Advance = lambda share: None,
        processes: Processes = ALONE,
    ) -> Going:
        some, gone = first_batches(batches, self.tokens), list[int]()
        order, count = [*chain.from_iterable(may_go(model))], sum(counts)
        while len(gone) < count:
            went = Counter(model.blocks[index].part for index in gone)
            open_parts = {part for part, own in enumerate(counts) if went[part] < own}
            tried = [index for index in order if index not in gone and model.blocks[index].part in open_parts]
            if gone and self.candidates:
                tried = tried[: self.candidates]
            shares = processes.gather(divergences(model, some, processes.own(tried), gone))
            found = {index: cost for own in shares for index, cost in own.items()}
            nearest = sorted(tried, key=found.__getitem__)
            gone.append(nearest[0])
            advance(1 / count)
            order = [*nearest[1:], *(index for index in order if index not in tried)]
        return Going(gone)


@dataclass(frozen=True)
class SpanErrors:
    """Errors of the maps of all spans that may go; the maps themselves are solved again once a few spans are left."""

    walk: MapWalk
    errors: Sequence[Mapping[Span, float]]
    """By list, the same in all processes."""

    def least(self, counts: Sequence[int], spans: int, each: int) -> list[list[tuple[Span, ...]]]:
        """Return the sets of spans with the least errors, by list; none for a list that loses no block.

        counts: number of blocks to remove from each list; spans, each: as in `best_sets`. Raises UnsupportedModel.
        """
        sets = [best_sets(own, count, spans, each) for own, count in zip(self.errors, counts, strict=True)]
        for own, count in zip(sets, counts, strict=True):
            if count and not own:
                raise UnsupportedModel(
                    f"no map could replace {count} of the blocks: the block before them needs a matrix whose result is only "
                    "added to its output"
                )
        return sets

    def error(self, spans: Iterable[Span]) -> float:
        """Return the error of a set of spans."""
        return sum(own[span] for span in spans for own in self.errors if span in own)


@dataclass(frozen=True)
class Mapped:
    """Replace blocks in a row by a linear map, merged into the block before them (ReplaceMe, arXiv 2505.02819).

    Among the sets of spans whose maps have the least error, the one that moves the distributions least is taken.
    """

    tokens: int = MAP_TOKENS
    """Minimum number of calibration tokens for solving the maps (for image models: one batch); a quarter of them ranks spans."""
    spans: int = MAP_SPANS
    """Maximum number of spans."""
    candidates: int = MAP_CANDIDATES
    """Number of sets tried for each number of spans, on 2,048 tokens."""

    def __post_init__(self) -> None:
        require_positive(tokens=self.tokens, spans=self.spans, candidates=self.candidates)

    def choose(
        self,
        model: ProvenModel,
        batches: Sequence[Tensor],
        counts: Sequence[int],
        advance: Advance = lambda share: None,
        processes: Processes = ALONE,
    ) -> Going:
        measured = self.measure(model, batches, counts, scaled(advance, 0.7), processes)
        going = self.choose_among(measured, batches, counts)
        advance(0.3)
        return going

    def choose_among(self, measured: SpanErrors, batches: Sequence[Tensor], counts: Sequence[int]) -> Going:
        """Choose the blocks to remove among measured spans. Other arguments as in `choose`."""
        model, processes = measured.walk.model, measured.walk.processes
        sets = measured.least(counts, self.spans, self.candidates)
        maps = dict(measured.walk.of_outputs({span for own in sets for one in own for span in one}))
        tried = {one: {span: maps[span] for span in one} for own in sets for one in own}
        own = {one: tried[one] for one in processes.own([*tried])}
        found = divergences_mapped(model, first_batches(batches, COMPARED_BY_KL), own, measured.walk.writers)
        costs = {one: cost for some in processes.gather(found) for one, cost in some.items()}
        gone = [span for own in sets if own for span in min(own, key=costs.__getitem__)]
        return Going([index for span in gone for index in span.gone], [span.before for span in gone])

    def measure(
        self,
        model: ProvenModel,
        batches: Sequence[Tensor],
        counts: Sequence[int],
        advance: Advance = lambda share: None,
        processes: Processes = ALONE,
    ) -> SpanErrors:
        """Measure the maps of all spans. Arguments as in `choose`; counts: maximum number of blocks of a span, by list."""
        writers = find_writers(model)
        walk = MapWalk(model, writers, processes.own(first_batches(batches, self.tokens // 4)), processes)
        spans = [self._spans(model, writers, part, count) for part, count in enumerate(counts)]
        every = {*chain.from_iterable(spans)}
        share = 1 / (1 + max((span.last for span in every), default=0))
        solved = walk.of_outputs(every, scaled(advance, share)) if every else ()
        found = {span: one.error for span, one in solved}
        return_free_memory()  # of the features
        # The first process decides, since another machine may round differently.
        errors = processes.from_first(lambda: found)
        return SpanErrors(walk, [{span: errors[span] for span in own} for own in spans])

    def _spans(self, model: ProvenModel, writers: Mapping[int, Writers], part: int, most: int) -> list[Span]:
        """Return the spans of one list whose blocks may all go."""
        free = {*may_go(model)[part]} if most else set[int]()
        befores = [block.index for block in model.blocks if block.part == part and block.index in writers]
        spans = (Span(before, count) for before in befores for count in range(1, most + 1))
        return [span for span in spans if free.issuperset(span.gone)]


BLOCK_SCORES: dict[str, BlockScore] = {"map": Mapped(), "kl": Divergence(), "influence": Influence()}
"""Scores of blocks by name."""


def block_score_named(asked: Choice) -> BlockScore:
    """Return the named score with its options. Raises BadInput for an unknown name or option."""
    return one_of(BLOCK_SCORES, "score", asked.name, asked.options)


@torch.no_grad()
def influences(
    model: ProvenModel,
    batches: Sequence[Tensor],
    advance: Advance = lambda share: None,
    processes: Processes = ALONE,
) -> list[float]:
    """Return, for each block, one minus the mean cosine of its input and output over tokens; infinite if their shapes differ.

    model, batches, advance, processes: as in `BlockScore.choose`; the batches are divided among processes.
    """
    total, count = [0.0] * len(model.blocks), [0] * len(model.blocks)
    own = processes.own(batches)
    for some in _together(model, own):
        share = len(some) / (len(own) * len(model.blocks))
        recording, moves = record_batches(model, some), Dense(keep=Tensor.clone)
        for event in Walk(model.idle(), recording, moves=moves, advance=scaled(advance, share)):
            if not isinstance(event, BlockDone):
                continue
            index = event.block.index
            for before, after in zip(event.before, event.after, strict=True):
                if after.shape != before.shape:
                    total[index] = -torch.inf
                else:
                    cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
                    total[index] += float(cosine.sum(dtype=torch.float64))
                count[index] += after[..., 0].numel()
    sums, counts = (map(sum, zip(*processes.gather(one), strict=True)) for one in (total, count))
    return [1.0 - cosines / max(tokens, 1) for cosines, tokens in zip(sums, counts, strict=True)]


def _together(model: ProvenModel, batches: Sequence[Tensor]) -> Sequence[Sequence[Tensor]]:
    """Group the batches that pass through the blocks together: all for a streamed model, else one each, to save memory."""
    return [batches] if model.weights.streams and batches else [[batch] for batch in batches]


@torch.no_grad()
def divergences(
    model: ProvenModel, batches: Sequence[Tensor], tried: Collection[int], gone: Collection[int] = ()
) -> dict[int, float]:
    """Return KL(dense ‖ without one more block), in nats per token (per image).

    All variants pass through the blocks together, so each block is loaded once; the blocks before the removed one run
    once for all of them.

    Args:
        model: the dense model.
        batches: as in `record_batches`.
        tried: numbers of the blocks to remove one at a time.
        gone: numbers of blocks removed in every variant.

    Returns:
        The divergence by block number; infinite for a block that changes its input's shape.
    """
    total, count = dict.fromkeys(tried, 0.0), 0
    for some in _together(model, batches):
        recording = record_batches(model, some)
        ways = _Ways(model, tried, gone, recording.apart())
        for event in Walk(model.idle(), recording, moves=Dense()):
            if isinstance(event, BlockDone):
                ways.move(event.block)
        for batch, tokens in enumerate(some):
            dense = logits_of(model, tokens, recording.hidden[batch])
            count += dense.shape[0]
            for index in tried:
                way = ways.without.get(index)
                total[index] += (
                    torch.inf if way is None else kl_of_logits(dense, logits_of(model, tokens, way.hidden[batch]))
                )
    return {index: found / max(count, 1) for index, found in total.items()}


@torch.no_grad()
def divergences_mapped(
    model: ProvenModel,
    batches: Sequence[Tensor],
    tried: Mapping[tuple[Span, ...], Mapping[Span, Map]],
    writers: Mapping[int, Writers],
) -> dict[tuple[Span, ...], float]:
    """Return KL(dense ‖ with the spans replaced by their maps) for each set of spans, in nats per token (per image).

    Args:
        model: the dense model.
        batches: as in `record_batches`.
        tried: the sets, with their maps.
        writers: matrices of the blocks before the spans that receive the maps.
    """
    total, count = dict.fromkeys(tried, 0.0), 0
    gone = {one: {index for span in one for index in span.gone} for one in tried}
    for some in _together(model, batches) if tried else ():
        base, ways = record_batches(model, some), dict[tuple[Span, ...], Recording]()
        for event in Walk(model.idle()):
            if not isinstance(event, BlockDone):
                continue
            block = event.block
            for one, maps in tried.items():
                merged = next((own for span, own in maps.items() if span.before == block.index), None)
                if one not in ways and merged is not None:
                    ways[one] = base.apart()
                if one in ways:
                    with nullcontext() if merged is None else writers[block.index].merged(merged):
                        ways[one].go_past(model, block, runs=block.index not in gone[one])
            base.go_past(model, block)
        for batch, tokens in enumerate(some):
            dense = logits_of(model, tokens, base.hidden[batch])
            count += len(dense)
            for one, way in ways.items():
                total[one] += kl_of_logits(dense, logits_of(model, tokens, way.hidden[batch]))
    return {one: found / max(count, 1) for one, found in total.items()}


@dataclass
class _Ways:
    """The state of the batches without the removed blocks, and without one more candidate each."""

    model: ProvenModel
    tried: Collection[int]
    gone: Collection[int]
    base: Recording
    """State without the removed blocks."""
    without: dict[int, Recording] = field(default_factory=dict)
    """States by the number of the block left out in addition."""

    def move(self, block: Block) -> None:
        runs = block.index not in self.gone
        for way in self.without.values():
            way.go_past(self.model, block, runs)
        spared = self.base.apart()
        self.base.go_past(self.model, block, runs)
        if block.index in self.tried:
            spared.go_past(self.model, block, runs=False)
            if all(a.shape == b.shape for a, b in zip(spared.hidden, self.base.hidden, strict=True)):
                self.without[block.index] = spared


def logits_of(model: ProvenModel, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits computed from the last block's output: N × V."""
    return run_after_blocks(model.module, model.blocks, tokens, model.structure.answers, hidden).flatten(0, -2)


def kl_of_logits(dense: Tensor, other: Tensor) -> float:
    """Return KL(dense ‖ other) summed over rows, in nats. dense, other: logits, N × V."""
    total = 0.0
    for p, q in zip(dense.split(KL_ROWS), other.split(KL_ROWS), strict=True):
        log_p, log_q = (one.to(torch.float32).log_softmax(dim=-1) for one in (p, q))
        gap = log_q.neg_().add_(log_p)  # in place, since a row is as long as the vocabulary
        total += float(gap.mul_(log_p.exp_()).sum())
    return total
