"""Record every block's arguments in one cheap forward, so that each block can be replayed alone.

Blocks of one model differ in their arguments (sliding and full attention, rotary tables), so each block's call is kept. While
recording, blocks are idle: they pass on their input. This works because the arguments besides the hidden states depend only on
shapes and positions, or are streams: values that earlier blocks put into a mapping for later ones (keys and values that
layers share), that they return beside the hidden states (position biases), or that an encoder computed. One sample checks this
before anything is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from coprune.base.errors import UnsupportedModel
from coprune.data.pairs import Pairs
from coprune.model.blocks import Block

Place = int | str
"""Place of an argument of a block: its position after the hidden states, or its name."""
Stream = MutableMapping[Any, Any]
"""Values that blocks leave for later ones, in their state between two blocks."""


@dataclass(frozen=True)
class FromStream:
    """Placeholder in a recorded call for a stream, or for its value under a key."""

    number: int
    key: Place | None = None


@dataclass(frozen=True)
class Handed:
    """Values that a block takes from other blocks as arguments, and those that it returns for later ones.

    Both are kept in one stream, after the model's own mappings, under their places as arguments.
    """

    takes: tuple[Place, ...] = ()
    leaves: tuple[tuple[int, Place], ...] = ()
    """Positions in the block's output, with the places where later blocks take them."""


NOTHING_HANDED = Handed()


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block for one batch, without the hidden states, and the shape of its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None
    """Name of the keyword that carries the hidden states, or None if they come first."""
    leaves: tuple[tuple[int, Place], ...] = ()
    """As in `Handed`."""

    def run(self, block: Callable[..., Any], hidden: Tensor, streams: Sequence[Stream] = ()) -> Tensor:
        """Run the block (its module or its forward) on hidden states and return the new ones.

        streams: the values left by earlier blocks; the block adds its own.
        """
        output = self.answer(block, hidden, streams)
        for entry, place in self.leaves:
            streams[-1][place] = output[entry]
        return hidden_of(output)

    def answer(self, block: Callable[..., Any], hidden: Tensor, streams: Sequence[Stream] = ()) -> Any:
        """Run as `run`, but return the whole output and leave the streams unchanged."""
        # Some blocks write to a mapping among their arguments, even if nobody reads it.
        args, kwargs = snapshot(self.args), snapshot(self.kwargs)
        if streams:
            args = tuple(_handed_over(value, streams) for value in args)
            kwargs = {name: _handed_over(value, streams) for name, value in kwargs.items()}
        if self.keyword is None:
            return block(hidden, *args, **kwargs)
        return block(*args, **{self.keyword: hidden}, **kwargs)

    @property
    def places(self) -> list[Place]:
        """Places of the call's arguments."""
        return [*range(len(self.args)), *self.kwargs]

    def at(self, place: Place) -> Any:
        """Return the argument at a place, or None."""
        if isinstance(place, str):
            return self.kwargs.get(place)
        return self.args[place] if place < len(self.args) else None

    def with_streams(self, places: Sequence[Place], handed: Handed = NOTHING_HANDED) -> BlockCall:
        """Replace the arguments at these places, and those handed to the block, by placeholders.

        A stream's number is the index of its place.
        """
        numbers = {place: FromStream(number) for number, place in enumerate(places) if self.at(place) is not None}
        numbers |= {place: FromStream(len(places), place) for place in handed.takes}
        args = tuple(numbers.get(position, value) for position, value in enumerate(self.args))
        kwargs = {name: numbers.get(name, value) for name, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs, leaves=handed.leaves)

    def in_float32(self) -> BlockCall:
        """Return the call for a block with float32 parameters."""
        return replace(self, args=in_float32(self.args), kwargs=in_float32(self.kwargs))


def _handed_over(value: Any, streams: Sequence[Stream]) -> Any:
    if not isinstance(value, FromStream):
        return value
    stream = streams[value.number]
    return stream if value.key is None else stream[value.key]


def open_streams(
    calls: Sequence[BlockCall], places: Sequence[Place], handed: Sequence[Handed]
) -> tuple[list[BlockCall], list[Stream]]:
    """Replace streams by placeholders in calls that were recorded with idle blocks.

    Args:
        calls: of all blocks.
        places: of the arguments that are mappings shared between blocks.
        handed: for every block, the other values that it takes or leaves.

    Returns:
        The calls, and the streams as they are before the first block.
    """
    first: list[Stream] = [next(v for call in calls if (v := call.at(place)) is not None) for place in places]
    beside: list[Stream] = [{}] if any(one.takes for one in handed) else []
    return [call.with_streams(places, own) for call, own in zip(calls, handed, strict=True)], [*first, *beside]


def forward_logits(model: nn.Module, batch: Tensor, last: int | None = None) -> Tensor:
    """Run a model on one batch: token ids (B × S), images (B × C × H × W), or `Pairs`.

    The model's `main_input_name` says where the batch goes; images are cast to the model's dtype. last: compute the logits
    of only this many final positions, if the model's forward has such an option (logits of all take S × V memory).
    Returns logits (B × S × V, B × classes or B × S × classes), or the hidden states (B × S × H) of a model without a head.
    """
    name: str = getattr(model, "main_input_name", "input_ids")
    given = batch.source if isinstance(batch, Pairs) else batch
    if given.is_floating_point():
        given = given.to(next(model.parameters()).dtype)
    options: dict[str, Any] = {"decoder_input_ids": batch.written} if isinstance(batch, Pairs) else {}
    if (name == "input_ids" or options) and takes(model, "use_cache"):
        options["use_cache"] = False
    if last is not None and chooses_positions(model):
        # Positions instead of a number: with a slice of the hidden states torch would copy the head's whole weight.
        positions = batch.shape[-1]
        options["logits_to_keep"] = torch.arange(max(0, positions - last), positions, device=batch.device)
    answer = model(**{name: given}, **options)
    for called in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(answer, called, None), Tensor):
            return found
    raise UnsupportedModel("the model returns neither logits nor hidden states")


def chooses_positions(model: nn.Module) -> bool:
    """Return whether a model's forward can compute the logits of some positions only."""
    return "logits_to_keep" in signature(model.forward).parameters


def takes(model: nn.Module, option: str) -> bool:
    """Return whether a model's forward accepts an option, by name or as a keyword."""
    parameters = signature(model.forward).parameters
    return option in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


class Finished(Exception):
    """Raised by the last block of a recording forward, so that the head is not computed."""


def input_device(model: nn.Module) -> torch.device:
    """Return the device of a model's inputs."""
    embeddings = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return next((embeddings or model).parameters()).device


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in a block's output: the output itself, or the first entry of a tuple."""
    # A named tuple may hold several streams of hidden states (Reformer).
    if isinstance(output, tuple | list) and output and not hasattr(output, "_fields"):
        output = output[0]
    if not isinstance(output, Tensor):
        raise UnsupportedModel(f"a block returns {type(output).__name__} instead of hidden states")
    return output


@dataclass(frozen=True)
class Answer:
    """The form of a block's output, for idle blocks to imitate."""

    entries: int
    """Length of the output tuple, which begins with the hidden states; 0 if the output is not a tuple."""
    shape: tuple[int, ...] | None
    """Output shape of one sample's hidden states if the block changes it (down-sampling), else None."""

    @classmethod
    def of(cls, output: Any, hidden: Tensor) -> Answer:
        """Derive the form of a block's output. hidden: its input."""
        shape = tuple(hidden_of(output).shape[1:])
        return cls(len(output) if isinstance(output, tuple | list) else 0, shape if shape != hidden.shape[1:] else None)

    def wrap(self, hidden: Tensor) -> Any:
        """Return hidden states in the form of the block's output."""
        return (hidden, *[None] * (self.entries - 1)) if self.entries else hidden

    def idle(self, hidden: Tensor) -> Any:
        """Return the output of a block that passes its input on, or zeros if the shape changes."""
        return self.wrap(hidden if self.shape is None else hidden.new_zeros(hidden.shape[0], *self.shape))


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Split a block's arguments into the hidden states and a snapshot of the rest."""
    args, kwargs = snapshot(args), snapshot(kwargs)
    if args and isinstance(args[0], Tensor):
        return args[0], BlockCall(args[1:], kwargs, None)
    if isinstance(kwargs.get("hidden_states"), Tensor):
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        return kwargs["hidden_states"], BlockCall(args, rest, "hidden_states")
    raise UnsupportedModel("a block is called without hidden states as its first argument")


@contextmanager
def replaced_forwards(blocks: Sequence[Block], forward: Callable[[Block], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of every block in the body."""
    with ExitStack() as stack:
        for block in blocks:
            own = vars(block.module)
            # Some tools (accelerate's hooks) set a forward on the instance, which is restored.
            if "forward" in own:
                stack.callback(own.__setitem__, "forward", own["forward"])
            else:
                stack.callback(own.pop, "forward")
            own["forward"] = forward(block)
        yield


def run_without_blocks(
    model: nn.Module, blocks: Sequence[Block], batch: Tensor, answers: Sequence[Answer]
) -> tuple[Tensor, list[BlockCall]]:
    """Run the model on one batch with idle blocks and record their calls.

    batch: as in `forward_logits`; answers: one for every block.
    Returns the first block's hidden states (B × S × H, or of any other shape for images) and one call per block.
    """
    calls: list[BlockCall] = []
    first: list[Tensor] = []

    def record(block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = split_call(args, kwargs)
            if not calls:
                first.append(hidden)
            calls.append(call)
            if len(calls) == len(blocks):
                raise Finished
            return answers[block.index].idle(hidden)

        return forward

    with replaced_forwards(blocks, record), suppress(Finished):
        forward_logits(model, batch)
    if len(calls) != len(blocks):
        raise UnsupportedModel(f"a forward visits {len(calls)} of the model's {len(blocks)} blocks")
    return first[0], calls


def enter_part(
    model: nn.Module, blocks: Sequence[Block], block: Block, batch: Tensor, answers: Sequence[Answer], hidden: Tensor
) -> tuple[Tensor, BlockCall]:
    """Run the model up to the first block of a further list, such as a decoder's after its encoder.

    Args:
        model: the model, whose earlier blocks are idle.
        blocks: all its blocks.
        block: the first one of the list.
        batch: as in `forward_logits`.
        answers: one for every block.
        hidden: the output of the block before it.

    Returns:
        The block's input hidden states, and its call.
    """
    found: list[tuple[Tensor, BlockCall]] = []

    def stop(other: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given, call = split_call(args, kwargs)
            if other is block:
                found.append((given, call))
                raise Finished
            own = answers[other.index]
            return own.wrap(hidden) if other.index + 1 == block.index else own.idle(given)

        return forward

    with replaced_forwards(blocks[: block.index + 1], stop), suppress(Finished):
        forward_logits(model, batch)
    return found[0]


def run_after_blocks(
    model: nn.Module,
    blocks: Sequence[Block],
    batch: Tensor,
    answers: Sequence[Answer],
    hidden: Tensor,
    last: int | None = None,
) -> Tensor:
    """Run the model on the last block's output: final norm and head.

    batch, last: as in `forward_logits`; hidden: the last block's output for the same samples. Returns logits.
    """

    def pass_on(block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            own = answers[block.index]
            return own.wrap(hidden) if block is blocks[-1] else own.idle(split_call(args, kwargs)[0])

        return forward

    with replaced_forwards(blocks, pass_on):
        return forward_logits(model, batch, last)


def snapshot(value: Any) -> Any:
    """Copy the containers of a value (not its tensors), so that the model's later changes to them do not show."""
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(snapshot(item) for item in value)
    # Not only dict: transformers has its own mapping for keys and values that layers share.
    return _mapped(value, snapshot) if isinstance(value, MutableMapping) else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def _mapped(value: MutableMapping[Any, Any], change: Callable[[Any], Any]) -> MutableMapping[Any, Any]:
    """Copy a mapping of any kind with changed items."""
    changed = copy.copy(value)
    for key, item in value.items():
        changed[key] = change(item)
    return changed


def in_float32(value: Any) -> Any:
    """Copy a value, converting half-precision tensors to float32; containers of unknown kinds are shared."""
    if isinstance(value, Tensor):
        return value.to(torch.float32) if value.dtype in (torch.float16, torch.bfloat16) else value
    if type(value) in (tuple, list):
        return type(value)(in_float32(item) for item in value)
    return _mapped(value, in_float32) if isinstance(value, MutableMapping) else value


def cloned(value: Any) -> Any:
    """Copy a value with its tensors; containers of unknown kinds are shared."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(cloned(item) for item in value)
    return _mapped(value, cloned) if isinstance(value, MutableMapping) else value


def same_value(a: Any, b: Any, ignored: Container[int] = ()) -> bool:
    """Return whether two recorded arguments are equal: tensors, containers of tensors, or plain values.

    Other objects (a configuration, a function) are equal if their types are.

    Args:
        a: one recorded argument.
        b: the other.
        ignored: ids of tensors in `a` that may be missing or different in `b`.
    """
    ours = list(tensors_in(a)) if ignored else []
    if ours and all(id(tensor) in ignored for tensor in ours):
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [key for key in a if key in b or not same_value(a[key], None, ignored)]
        return b.keys() <= a.keys() and all(key in b and same_value(a[key], b[key], ignored) for key in keys)
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(same_value(*pair, ignored) for pair in zip(a, b, strict=True))
    if type(a) is not type(b):
        return False
    return a == b if isinstance(a, bool | int | float | str | type(None)) else True


class TensorPool:
    """Keeps one copy of equal tensors, since most batches get the same masks and position tables.

    Tensors are compared only with those at the same place of earlier calls, so this costs little.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], list[Tensor]] = {}
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by id; holds the tensor, so that its id is not reused

    def forget_batch(self) -> None:
        """Forget the identities of one batch's tensors."""
        self._known.clear()

    def share(self, value: Any) -> Any:
        """Replace every tensor in a value by the kept equal one."""
        if isinstance(value, Tensor):
            return self._share_tensor(value)
        if isinstance(value, dict):
            return {key: self.share(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.share(item) for item in value)
        return value

    def _share_tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        key = (tensor.shape, tensor.dtype, tensor.device)
        candidates = self._kept.setdefault(key, [])
        kept = next((other for other in candidates if torch.equal(other, tensor)), None)
        if kept is None:
            kept = tensor
            candidates.append(tensor)
        self._known[id(tensor)] = (tensor, kept)
        return kept
