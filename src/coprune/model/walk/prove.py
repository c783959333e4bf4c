"""Prove on one sample that replaying the blocks one by one computes what the model does; refuse the model otherwise.

In one forward, every block is also replayed from its recorded call on the output of the previous replayed block. This also
reveals the form of a block's output, the mixtures of experts, the matrices that share an input, and those used repeatedly.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coprune.base.errors import CopruneError, NumericalError, UnsupportedModel
from coprune.model.blocks import Block
from coprune.model.leftovers import left_out
from coprune.model.matrices import Matrix, find_matrices
from coprune.model.matrix_choice import UNUSED, Evidence, confirm
from coprune.model.walk.block_calls import (
    Answer,
    BlockCall,
    Handed,
    Place,
    Stream,
    enter_part,
    forward_logits,
    hidden_of,
    open_streams,
    replaced_forwards,
    run_after_blocks,
    run_without_blocks,
    same_value,
    snapshot,
    split_call,
    tensors_in,
)
from coprune.model.walk.model_structure import FoundModel, ProvenModel, Structure
from coprune.model.walk.observe import Products, Reads, observe_products
from coprune.model.walk.recording import begin_part

# The replay repeats the same operations, so only devices without a fixed order of additions differ, by rounding. A wrong mask
# or position table changes some token's hidden states by far more. Compared token by token, since in many models the first
# token's are a thousand times larger and would hide the others.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 2e-2

COMPARED_LOGITS = 32
"""Number of final positions whose logits are compared. Hidden states are compared at all positions, but with a large
vocabulary all logits would take more memory than the rest of a run."""


@torch.no_grad()
def prove_replay(found: FoundModel, sample: Tensor) -> ProvenModel:
    """Compare a real forward of one sample with the replay, block by block and at the logits.

    Args:
        found: the model; its blocks are acquired one at a time.
        sample: a batch of one, as in `forward_logits`.

    Returns:
        The model with the observed structure, and the matrices chosen accordingly.

    Raises:
        UnsupportedModel: names the block or matrix where they differ, or see `confirm`.
        BadInput: no matrix is left to prune.
        NumericalError: names a block whose activations are not finite.
    """
    watched = _Watched(found, Structure(sample))
    try:
        logits = _watch(watched, found, sample)
    except _BlockSkipped as passed:
        found = _without_skipped(found, sample, passed.answer)
        watched = _Watched(found, Structure(sample))
        try:
            logits = _watch(watched, found, sample)
        except _BlockSkipped:
            raise UnsupportedModel("a forward does not always call the same blocks") from None
    model, blocks, structure, last = found.module, found.blocks, watched.structure, watched.replayed
    if last is None:
        raise UnsupportedModel(
            f"{blocks[0].name} is not a module that a forward calls, so it cannot be replayed as a block"
        )
    structure.streams, structure.handed = watched.streams.read, watched.streams.handed
    structure.producers = watched.streams.producers
    _require_same_calls(found, structure, watched)
    after = run_after_blocks(model, blocks, sample, structure.answers, last, COMPARED_LOGITS)
    if not _close(after, logits):
        raise UnsupportedModel("the logits after the replayed blocks differ from the model's forward")
    chosen = confirm(found.chosen, blocks, [_evidence(seen) for seen in watched.products])
    once = {matrix.name for uses in chosen.several for matrix in uses}
    for seen, matrices, candidates in zip(watched.products, chosen.blocks, chosen.candidates, strict=True):
        structure.groups.append(_groups(seen, matrices))
        structure.shared.append(_groups(seen, [matrix for matrix in candidates if matrix.name in once]))
        names = {matrix.name for matrix in matrices}
        structure.reused += [matrix.name for matrix in seen.reused if matrix.name in names]
    unused = [(matrix.name, UNUSED) for block in found.passed for matrix in find_matrices(block.module, block.name)]
    chosen = replace(chosen, left_out=[*chosen.left_out, *left_out(unused)])
    return ProvenModel(found.weights, found.blocks, chosen, structure, passed=found.passed)


class _BlockSkipped(Exception):
    """A forward skipped a block. answer: the form of an earlier block's output."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.answer = answer


def _watch(watched: _Watched, found: FoundModel, sample: Tensor) -> Tensor:
    """Run one real forward and return its logits. Raises _BlockSkipped where it does not call every block."""
    forwards = {block.index: block.module.forward for block in found.blocks}

    def watch(block: Block) -> Callable[..., Any]:
        return partial(watched.run, block, forwards[block.index])

    with (
        replaced_forwards(found.blocks, watch),
        replaced_forwards(found.passed, lambda block: partial(_refuse_order, block)),
        _failures_named(found.module),
    ):
        logits = forward_logits(found.module, sample, COMPARED_LOGITS)
    if 0 < len(watched.calls) < len(found.blocks):
        raise _BlockSkipped(watched.structure.answers[-1])
    return logits


def _without_skipped(found: FoundModel, sample: Tensor, answer: Answer) -> FoundModel:
    """Return the model without the blocks that a forward skips. answer: form of an idle block's output."""
    called: list[int] = []

    def note(block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            called.append(block.index)
            return answer.idle(split_call(args, kwargs)[0])

        return forward

    with replaced_forwards(found.blocks, note), _failures_named(found.module):
        forward_logits(found.module, sample, COMPARED_LOGITS)
    first = next((index for index, after in pairwise(called) if index >= after), None)
    if first is not None:
        _refuse_order(found.blocks[first])
    kept, chosen = [block for block in found.blocks if block.index in called], found.chosen
    return replace(
        found,
        blocks=[replace(block, index=index) for index, block in enumerate(kept)],
        chosen=replace(
            chosen,
            blocks=[chosen.blocks[block.index] for block in kept],
            candidates=[chosen.candidates[block.index] for block in kept],
        ),
        passed=[block for block in found.blocks if block.index not in called],
    )


def _refuse_order(block: Block, *_: Any, **__: Any) -> Any:
    raise UnsupportedModel(f"{block.name} runs out of order or twice, but coprune walks blocks once, in order")


@contextmanager
def _failures_named(model: nn.Module) -> Iterator[None]:
    """Convert exceptions of a model's own code, given text (or images) alone, to UnsupportedModel."""
    try:
        yield
    except (CopruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if raised_in.is_relative_to(Path(__file__).parents[2]):
            raise
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
        raise UnsupportedModel(
            f"{type(model).__name__} of transformers cannot run such inputs alone ({said})"
        ) from error


class _Watched:
    """The observations of one forward, in which each block is replayed on the previous replay's output."""

    def __init__(self, found: FoundModel, structure: Structure) -> None:
        self.structure = structure
        self.products: list[Products] = []
        self.calls: list[tuple[BlockCall, set[int]]] = []
        """Every block's call, with the tensors among its arguments that the block does not use."""
        self.replayed: Tensor | None = None
        """The last replayed hidden states."""
        self.begun: list[tuple[Tensor, Tensor]] = []
        """For every further list of blocks: the replayed output of the previous list, and its own first input."""
        self.streams = _Streams()
        self._found = found

    def run(self, block: Block, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the block's own output. Raises UnsupportedModel or NumericalError if the replay differs."""
        if block.index > len(self.calls) > 0:
            raise _BlockSkipped(self.structure.answers[-1])
        if block.index != len(self.calls):
            _refuse_order(block)
        hidden, call = split_call(args, kwargs)
        if self.replayed is not None and block.part != self._found.blocks[block.index - 1].part:
            self.begun.append((self.replayed, hidden))
            self.replayed = None
        if self.replayed is not None and not _close(hidden, self.replayed):
            raise UnsupportedModel(f"the model changes the hidden states between the blocks, before {block.name}")
        weights, candidates = self._found.weights, self._found.chosen.candidates[block.index]
        weights.acquire(block.name)
        given = list(tensors_in((call.args, call.kwargs)))
        # Recorded before the block runs, so that a nested block is detected as out of order.
        self.calls.append((call, set()))
        live = _live_mappings(args, kwargs, call)
        with Reads(given) as reads:
            output, seen = observe_products(candidates, lambda: forward(*args, **kwargs))
        self.calls[-1] = call, {id(tensor) for tensor in given} - reads.ids
        self.products.append(seen)
        again = self.streams.replay(call, live, reads.ids, forward, hidden if self.replayed is None else self.replayed)
        self.streams.answered(output)
        if not bool(torch.isfinite(hidden_of(output)).all()):
            raise _not_finite(block)
        weights.release(block.name)
        if not _close(hidden_of(output), again):
            raise UnsupportedModel(f"{block.name} replayed from its recorded call differs from the model's forward")
        if (place := self.streams.differing(live)) is not None:
            raise UnsupportedModel(f"{block.name} when replayed, leaves other values for later blocks in {place!r}")
        self.replayed = again
        self.structure.answers.append(Answer.of(output, hidden))
        return output


def _live_mappings(args: tuple[Any, ...], kwargs: dict[str, Any], call: BlockCall) -> dict[Place, Stream]:
    """Return the mutable mappings among a block's arguments, which it may write to, by place."""
    skipped = len(args) - len(call.args)
    found: dict[Place, Any] = {position - skipped: value for position, value in enumerate(args) if position >= skipped}
    found |= {name: value for name, value in kwargs.items() if name in call.kwargs}
    return {place: value for place, value in found.items() if isinstance(value, MutableMapping)}


class _Streams:
    """Finds the values that blocks leave for later ones, in shared mappings or in their outputs, and replays them beside
    the hidden states."""

    def __init__(self) -> None:
        self._replayed: dict[Place, Stream] = {}
        self._objects: dict[Place, Stream] = {}
        self._read: set[Place] = set()
        self._takes: list[tuple[Place, ...]] = []
        self._leaves: list[dict[int, Place]] = []
        self._answered: dict[int, _Entry] = {}
        self._again: Sequence[Any] = ()
        self._written: dict[int, tuple[int, Tensor]] = {}
        self._read_of = set[int]()

    @property
    def producers(self) -> frozenset[int]:
        """Numbers of the blocks that compute values read by later ones, instead of passing them on."""
        made = (any(place not in own.takes for _, place in own.leaves) for own in self.handed)
        return frozenset(self._read_of | {number for number, makes in enumerate(made) if makes})

    @property
    def handed(self) -> list[Handed]:
        """For every block, the values that it takes from earlier ones and leaves for later ones."""
        return [Handed(takes, tuple(leaves.items())) for takes, leaves in zip(self._takes, self._leaves, strict=True)]

    @property
    def read(self) -> tuple[Place, ...]:
        """The places of mappings that one block wrote to and another one read."""
        return tuple(place for place in self._replayed if place in self._read)

    def replay(
        self,
        call: BlockCall,
        live: Mapping[Place, Stream],
        read: Container[int],
        block: Callable[..., Any],
        hidden: Tensor,
    ) -> Tensor:
        """Replay a block with the values that the replay has left so far.

        Args:
            call: as recorded before the block ran.
            live: its mappings, after it has run.
            read: ids of the tensors in its call that the block used.
            block: the block or its forward.
            hidden: its input.
        """
        for place, mapping in live.items():
            before = call.at(place)
            self._note_read(list(tensors_in(before)), mapping, read)
            if self._objects.setdefault(place, mapping) is not mapping:
                continue  # not shared between blocks
            if place not in self._replayed and not _holds_same(before, mapping):
                self._replayed[place] = snapshot(before)
            if place in self._replayed and any(id(tensor) in read for tensor in tensors_in(before)):
                self._read.add(place)
        places = [place for place in self._replayed if place in live and self._objects[place] is live[place]]
        found = {place: entry for place in call.places if (entry := self._answered.get(id(call.at(place)))) is not None}
        for place, entry in found.items():
            self._leaves[entry.block][entry.position] = place
        self._takes.append(tuple(found))
        self._leaves.append({})
        beside: Stream = {place: entry.replayed for place, entry in found.items()}
        opened = call.with_streams(places, Handed(tuple(found)))
        again = opened.answer(block, hidden, [*(self._replayed[place] for place in places), beside])
        self._again = again if isinstance(again, tuple | list) else ()
        return hidden_of(again)

    def _note_read(self, before: Sequence[Tensor], after: Stream, read: Container[int]) -> None:
        """Record which blocks wrote what the current one read from a mapping, and what it writes there."""
        self._read_of |= {self._written[id(one)][0] for one in before if id(one) in read and id(one) in self._written}
        held = {id(one) for one in before}
        self._written |= {id(one): (len(self._leaves), one) for one in tensors_in(after) if id(one) not in held}

    def answered(self, output: Any) -> None:
        """Record what the last replayed block returned beside the hidden states. output: its original output."""
        pairs = zip(output, self._again, strict=True) if self._again and len(output) == len(self._again) else ()
        for position, (own, replayed) in enumerate(pairs):
            if position and isinstance(own, Tensor) and isinstance(replayed, Tensor):
                self._answered[id(own)] = _Entry(len(self._leaves) - 1, position, replayed, own)

    def differing(self, live: Mapping[Place, Stream]) -> Place | None:
        """Return the place of a stream that differs from the replayed one, or None."""
        for place, replayed in self._replayed.items():
            if self._objects.get(place) is live.get(place):
                theirs, ours = list(tensors_in(live[place])), list(tensors_in(replayed))
                if len(theirs) != len(ours) or not all(_close(*pair) for pair in zip(theirs, ours, strict=True)):
                    return place
        return None


@dataclass(frozen=True)
class _Entry:
    """One entry of a block's output tuple."""

    block: int
    position: int
    replayed: Tensor
    own: Tensor
    """The value in the model's forward; held, so that its id is not reused."""


def _holds_same(before: Stream, after: Stream) -> bool:
    """Return whether a mapping holds the same tensor objects as its snapshot `before`."""
    ours, theirs = list(tensors_in(before)), list(tensors_in(after))
    return before.keys() == after.keys() and len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))


def _not_finite(block: Block) -> NumericalError:
    """Return the error about a block with non-finite output, whether caused by its weights or its input."""
    wrong = [name for name, weight in block.module.named_parameters() if not bool(torch.isfinite(weight).all())]
    if wrong:
        return NumericalError(f"{block.name}.{wrong[0]} of the dense model holds NaN or infinite values")
    return NumericalError(f"{block.name} of the dense model gives NaN or infinite activations")


def _require_same_calls(found: FoundModel, structure: Structure, watched: _Watched) -> None:
    """Raise UnsupportedModel if a block gets other arguments when the blocks before it are idle.

    Unused arguments may differ, if the blocks then compute the same with the others.

    Args:
        found: the model.
        structure: the sample, the outputs' forms and the streams; the inputs of further lists of blocks are added to it.
        watched: a real forward.
    """
    first, recorded = run_without_blocks(found.module, found.blocks, structure.sample, structure.answers)
    _note_parts(found, structure, watched, recorded)
    streams, exact = structure.streams, True
    idle_calls, left = open_streams(recorded, streams, structure.handed)
    for block, (call, unread), idle in zip(found.blocks, watched.calls, idle_calls, strict=True):
        real = call.with_streams(streams, structure.handed[block.index])
        a, b = (real.args, real.kwargs), (idle.args, idle.kwargs)
        if not same_value(a, b):
            exact = False
            if not same_value(a, b, unread):
                raise _depends(block)
    if exact:
        return
    hidden, part = first, found.blocks[0].part
    for block, idle in zip(found.blocks, idle_calls, strict=True):
        if block.part != part:
            part = block.part
            hidden, left = begin_part(found, structure, block, structure.sample, hidden)
        found.weights.acquire(block.name)
        try:
            hidden = idle.run(block.module, hidden, left)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise _depends(block) from error
        found.weights.release(block.name)
    assert watched.replayed is not None
    if not _close(watched.replayed, hidden):
        raise _depends(found.blocks[-1])


def _note_parts(found: FoundModel, structure: Structure, watched: _Watched, recorded: Sequence[BlockCall]) -> None:
    """Record in the structure which arguments of a further list's blocks come from the list before it.

    Args:
        found: the model.
        structure: as in `_require_same_calls`.
        watched: a real forward.
        recorded: every block's call with idle blocks, where those arguments differ.

    Raises:
        UnsupportedModel: with idle blocks and the replay's last output, the list begins differently.
    """
    firsts = [b for before, b in zip(found.blocks, found.blocks[1:], strict=False) if b.part != before.part]
    for block, (end, hidden) in zip(firsts, watched.begun, strict=True):
        again, entered = enter_part(found.module, found.blocks, block, structure.sample, structure.answers, end)
        real, idle = watched.calls[block.index][0], recorded[block.index]
        given = {
            place: value
            for place in real.places
            if isinstance(value := real.at(place), Tensor) and not same_value(value, idle.at(place))
        }
        for place, value in given.items():
            if not isinstance(own := entered.at(place), Tensor) or not _close(value, own):
                raise _depends(block)
        if not _close(hidden, again):
            raise UnsupportedModel(f"{block.name} gets different arguments after the replayed blocks before it")
        for other in (one for one in found.blocks if one.part == block.part):
            call, own_handed = watched.calls[other.index][0], structure.handed[other.index]
            taken = tuple(place for place in given if call.at(place) is given[place])
            structure.handed[other.index] = replace(own_handed, takes=(*own_handed.takes, *taken))


def _depends(block: Block) -> UnsupportedModel:
    return UnsupportedModel(
        f"{block.name} gets an argument that depends on what earlier blocks computed (such as keys and values "
        "shared between layers), so coprune cannot prune this model block by block"
    )


def _evidence(seen: Products) -> Evidence:
    multiplied = frozenset(matrix.name for group in seen.groups for matrix in group)
    backwards = frozenset(matrix.name for matrix in seen.backwards)
    return Evidence(multiplied, backwards, frozenset(seen.touched), frozenset(seen.ranked))


def _groups(seen: Products, chosen: Sequence[Matrix]) -> list[list[Matrix]]:
    """Return a block's chosen matrices grouped by their input tensor, in order of first use."""
    names = {matrix.name for matrix in chosen}
    # A reused matrix may be multiplied with different tensors (a decoder's keys of both halves), so it is a group of its own.
    again = {matrix.name for matrix in seen.reused}
    apart = [
        [[m for m in group if m.name not in again], *([m] for m in group if m.name in again)] for group in seen.groups
    ]
    groups = [[matrix for matrix in group if matrix.name in names] for parts in apart for group in parts]
    # An expert that this sample was not routed to is a group of its own.
    unseen = {matrix.name for matrix in seen.unseen}
    return [*(group for group in groups if group), *([matrix] for matrix in chosen if matrix.name in unseen)]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    tolerance = _TOLERANCE.get(a.dtype, _HALF_TOLERANCE)
    a32, b32 = a.to(torch.float32), b.to(torch.float32)
    return bool(((a32 - b32).norm(dim=-1) <= tolerance * a32.norm(dim=-1)).all())
