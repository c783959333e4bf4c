"""The smaller model that edits make, and its configuration.

Configuration settings are not known by name: every number as large as something that was cut is a candidate, accepted
if the resulting model has exactly the needed shapes.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coprune.model.checkpoint.companions import places_in, put_into
from coprune.model.checkpoint.conversion import load_tensors
from coprune.model.checkpoint.empty import without_weights
from coprune.model.checkpoint.load import prepare, quiet_transformers
from coprune.model.checkpoint.names import is_below_any
from coprune.model.transformers_private import (
    conversions_to_revert,
    revert_conversion,
    saved_tensors,
    set_conversions_to_revert,
    unsaved_parameters,
)
from coprune.model.walk.block_calls import input_device

Layout = Callable[[PreTrainedModel, dict[str, Tensor]], dict[str, Tensor]]
"""Maps a model's tensors to the names and shapes of a checkpoint."""
MOST_CANDIDATES = 500
"""Maximum number of configurations tried; each takes as long as making the modules."""


def possible_changes(
    model: PreTrainedModel, shapes: Mapping[str, Sequence[int]], resized: Resized, layout: Layout | None = None
) -> Iterator[dict[str, Any]]:
    """Yield configuration changes that give the model these shapes, the likeliest first.

    Args:
        model: the original model.
        shapes: of the smaller checkpoint's tensors.
        resized: the sizes to change.
        layout: maps a smaller model's tensors to the names in `shapes`; by default, those it would be saved with.

    Yields:
        New values by dotted path; only what differs.
    """
    wanted = {name: tuple(shape) for name, shape in shapes.items()}
    # Only one of tied weights is saved, but a model without weights lists both.
    unsaved = set(model.state_dict()) - set(saved_tensors(model))
    making = _Making(model, layout)
    before = making.before
    for one in _candidates(making, wanted, unsaved, resized):
        everywhere = with_all_counts(before, one)
        for changes in [everywhere, one] if everywhere != one else [one]:
            found = making.shapes(_changed(before, changes))
            if {name: shape for name, shape in found.items() if name in wanted or name not in unsaved} == wanted:
                yield changes


def refusal_of(model: PreTrainedModel, resized: Resized) -> str | None:
    """Return the configuration's own objection to the likeliest new sizes, or None."""
    config = model.config.to_dict()
    blocks, sizes, _ = choices_of(config, resized)
    told = [[one for one in options if one] for options in [*blocks, *sizes]]
    # A head's width may equal the number of heads.
    likeliest = [min(options, key=lambda one: not all(p.endswith("heads") for p in one)) for options in told if options]
    changes = {place: value for one in likeliest for place, value in one.items()}
    try:
        type(model.config).from_dict(_changed(config, changes))
    except Exception as error:  # its code may raise anything for inconsistent numbers
        said = str(error.__cause__ or error).strip().splitlines()[-1].strip()
        numbers = ", ".join(f"{place}={value}" for place, value in changes.items())
        return f"{type(model.config).__name__} refuses {numbers}: {said}"
    return None


def _candidates(
    making: _Making, wanted: Mapping[str, tuple[int, ...]], unsaved: Container[str], resized: Resized
) -> Iterator[dict[str, Any]]:
    """Yield candidates: for each change of the blocks, every change of the sizes; then all combined."""
    blocks, sizes, unsaid = choices_of(making.before, resized)
    tried: list[dict[str, Any]] = []
    whole = (
        first | last
        for first in _of_blocks(making, blocks, resized, wanted, unsaved)
        for last in _of_sizes(making, first, (sizes, unsaid), wanted)
    )
    for changes in chain(whole, _together([*blocks, *sizes, *unsaid]) if blocks else ()):
        if changes not in tried:
            tried.append(changes)
            yield changes


def _of_blocks(
    making: _Making,
    blocks: Choices,
    resized: Resized,
    wanted: Mapping[str, tuple[int, ...]],
    unsaved: Container[str],
) -> Iterator[dict[str, Any]]:
    """Yield changes that leave the remaining blocks, judged by tensor names; those that change block kinds come last."""
    outline = _outline(wanted)
    if not blocks:
        yield {}
        return

    def names_with(changes: Mapping[str, Any]) -> list[str]:
        found = making.shapes(_changed(making.before, changes))
        return [name for name in found if name in wanted or name not in unsaved]

    as_many = []
    for changes in _together(blocks):
        names = names_with(changes)
        if _outline(names) == outline:
            yield changes
        if _blocks_named(names) == _blocks_named(wanted):
            as_many.append(changes)
    for changes in as_many:
        for one in leading_of(making.before, resized):
            if not one.keys() & changes.keys() and _outline(names_with(changes | one)) == outline:
                yield changes | one


def _blocks_named(names: Iterable[str]) -> set[str]:
    """Return the names up to their first number."""
    return {found[0] for name in names if (found := re.match(r"(?:.*?\.)?\d+(?=\.)", name))}


def _outline(names: Iterable[str]) -> set[str]:
    """Return the names up to their second number: the structure of blocks without single experts."""
    return {re.sub(r"^((?:.*?\.)?\d+\..*?)\.\d+(\.|$).*", r"\1", name) for name in names}


def _of_sizes(
    making: _Making,
    first: Mapping[str, Any],
    choices: tuple[Choices, Choices],
    wanted: Mapping[str, tuple[int, ...]],
) -> Iterator[dict[str, Any]]:
    """Yield changes that give the sizes, together with any extra settings.

    Of many, first those that alone make a wanted shape, then those that alone make no unwanted one.
    """
    sizes, unsaid = choices
    every = [*sizes, *unsaid]
    if math.prod(map(len, every)) > 2 * sum(map(len, every)):
        for is_needed in (True, False):
            for said in _together(unsaid):
                for one in _together(_fitting(making, {**first, **said}, sizes, wanted, is_needed)):
                    yield {**one, **said}
    yield from _together(every)


def _fitting(
    making: _Making,
    first: Mapping[str, Any],
    sizes: Choices,
    wanted: Mapping[str, tuple[int, ...]],
    is_needed: bool,
) -> Choices:
    """Keep the changes that alone make no unwanted shape. is_needed: and that alone change some shape."""
    config, silent = _changed(making.before, first), {p for p, value in places_in(making.before) if value is None}
    whole = making.shapes(config)

    def fits(one: Mapping[str, Any]) -> bool:
        if not one or (is_needed and one.keys() & silent):
            return not one
        changed = making.shapes(_changed(config, one))
        return _may_fit(whole, changed, wanted) and not (is_needed and changed == whole)

    return [[*filter(fits, options)] for options in sizes]


def _together(choices: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield combinations of one choice each, up to `MOST_CANDIDATES`."""
    for chosen in islice(product(*choices), MOST_CANDIDATES):
        yield {place: value for part in chosen for place, value in part.items()}


def _may_fit(
    whole: Mapping[str, tuple[int, ...]], changed: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> bool:
    """Return whether every changed dimension has its old or its wanted size and no tensor disappears.

    An empty `changed` means that the change cannot be built alone; then the result is True.
    """
    if changed and not wanted.keys() <= changed.keys():
        return False
    return all(
        new in (old, last)
        for name in whole.keys() & changed.keys() & wanted.keys()
        for old, new, last in zip(whole[name], changed[name], wanted[name], strict=False)
    )


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    put_into(changed, changes)
    return changed


@dataclass(frozen=True)
class _Making:
    """A factory of the model under other configurations."""

    model: PreTrainedModel
    layout: Layout | None

    @cached_property
    def before(self) -> dict[str, Any]:
        """The original configuration."""
        found: dict[str, Any] = self.model.config.to_dict()
        return found

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the checkpoint for another configuration; empty if no model can be built."""
        try:
            small = _skeleton(self.model, config)
        except Exception:  # a model's code may raise anything for inconsistent numbers
            return {}
        tensors = (self.layout or revert_conversion)(small, small.state_dict())
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _skeleton(model: PreTrainedModel, config: Mapping[str, Any]) -> PreTrainedModel:
    made = type(model.config).from_dict(dict(config))
    made._attn_implementation = model.config._attn_implementation
    with quiet_transformers(), without_weights():
        small: PreTrainedModel = type(model)(made)
    # The loader determines the checkpoint's names, for example timm's.
    set_conversions_to_revert(small, conversions_to_revert(model))
    return small


def smaller_skeleton(model: PreTrainedModel, changes: Mapping[str, Any]) -> PreTrainedModel:
    """Return the smaller model without its weights. changes: of the configuration, from `possible_changes`."""
    return _skeleton(model, _changed(model.config.to_dict(), changes))


def fill(small: PreTrainedModel, below: nn.Module, tensors: Mapping[str, Tensor], like: PreTrainedModel) -> None:
    """Load values into the parameters below a module of a skeleton.

    Args:
        small: the skeleton.
        below: it, or one of its modules.
        tensors: of the checkpoint.
        like: the model that gives dtype and device.
    """
    device = input_device(like)
    for module in below.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=like.dtype, device=device)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    with quiet_transformers():
        load_tensors(small, tensors, device)
    for module in below.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def lend_outside(small: PreTrainedModel, model: PreTrainedModel, blocks: Sequence[str]) -> None:
    """Share a model's parameters and buffers outside the blocks with a skeleton. blocks: names of the blocks."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_below_any(name, blocks):
            continue
        path, _, attribute = name.rpartition(".")
        owner = small.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(attribute, tensor)
        else:
            owner._buffers[attribute] = tensor
    for module in small.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(input_device(model))


def build_smaller(model: PreTrainedModel, tensors: Mapping[str, Tensor], changes: Mapping[str, Any]) -> PreTrainedModel:
    """Build the smaller model in memory, ready to be run.

    Args:
        model: the original model, whose generation settings are taken over.
        tensors: of the smaller checkpoint.
        changes: of the configuration, from `possible_changes`.
    """
    small = smaller_skeleton(model, changes)
    fill(small, small, tensors, model)
    there = unsaved_parameters(model)
    for name, own in unsaved_parameters(small).items():
        path, _, attribute = name.rpartition(".")
        if (computed := there.get(name)) is not None and computed.shape == own.shape:
            small.get_submodule(path).register_parameter(attribute, computed)
    with quiet_transformers():
        small.tie_weights()
    if hasattr(model, "generation_config"):  # classifiers do not generate
        small.generation_config = model.generation_config
    small.name_or_path = model.name_or_path
    prepared: PreTrainedModel = prepare(small)
    return prepared


@dataclass(frozen=True)
class Shortened:
    """A list of blocks of which some are removed."""

    blocks: int
    """Original number of blocks."""
    dropped: Sequence[int]
    """Numbers of the removed blocks within the list."""

    @property
    def kept(self) -> list[int]:
        """Numbers of the remaining blocks."""
        return [index for index in range(self.blocks) if index not in self.dropped]


@dataclass
class Resized:
    """The changes of size that a model's configuration has to express."""

    sizes: Sequence[tuple[int, int]] = ()
    """Pairs of old and new numbers; one old number may have several new ones."""
    lists: Sequence[Shortened] = ()
    extra: dict[str, int] = field(default_factory=dict)
    """Values that may now have to be written, such as a head's width, which was derived from the number of heads."""
    arguments: dict[str, float] = field(default_factory=dict)
    """The same for a library that builds a model from its architecture's name (timm)."""


_EXPERTS = re.compile(r"(?!.*shared)(?:\w+_)?n(?:um)?_(?:\w+_)?experts")
"""Names under which programs look for the number of routed experts."""
_OF_TOKENS = ("token_id", "token_ids", "token_index", "tokens", "decoder_ids")
"""Name endings of token settings, which may equal a size by chance without any shape or logit showing it."""
Choices = list[list[dict[str, Any]]]
"""Candidate configuration changes for each changed number."""


def choices_of(config: Mapping[str, Any], resized: Resized) -> tuple[Choices, Choices, Choices]:
    """Return the changes that may describe the removed blocks, those for the new sizes, and the extra ones."""
    places = [(p, v) for p, v in places_in(config) if not p.endswith(_OF_TOKENS)]
    blocks = [options for own in resized.lists for options in _choices_of_blocks(places, own)]
    sizes, unsaid = Choices(), Choices()
    for old, new in resized.sizes:
        single = [p for p, v in places if type(v) is int and v == old]
        equal = {p: [new] * len(v) for p, v in places if isinstance(v, list) and v and all(one == old for one in v)}
        # No change comes last: some sizes follow from others or are not given.
        silent: list[dict[str, Any]] = [{p: new} for p, v in places if v is None]
        ratios = [] if single else [*_ratios(places, old, new)]
        sizes += [[*(dict.fromkeys(chosen, new) for chosen in _subsets(single)), *ratios, {}, *silent], _some(equal)]
    for key, value in resized.extra.items():
        # Values absent from a configuration are derived from others that change now.
        beside = re.compile(r"(.*\.)?(num_attention_heads|hidden_size)")
        holders = {found[1] or "" for place, _ in places if (found := beside.fullmatch(place))} or {""}
        silent_places = [holder + key for holder in holders if dict(places).get(holder + key) is None]
        unsaid.append([{}, *({place: value} for place in silent_places)])
    if "model_args" in config:
        for key, number in resized.arguments.items():
            (blocks if key == "depth" else sizes).append([{f"model_args.{key}": number}, {}])
    blocks, sizes = ([options for options in own if options] for own in (blocks, sizes))
    return blocks, sizes, unsaid


def with_all_counts(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Extend changes to every other number of experts beside or above a changed one.

    Other programs read settings that this model's code does not, and a configuration must not contradict itself.
    """
    said, more = dict(places_in(config)), dict[str, Any]()
    for place, new in changes.items():
        holder, _, name = place.rpartition(".")
        if _EXPERTS.fullmatch(name) and type(said.get(place)) is int:
            more |= {
                other: new
                for other, value in said.items()
                if type(value) is int
                and value == said[place]
                and _EXPERTS.fullmatch(other.rpartition(".")[2])
                and f"{holder}.".startswith(f"{other.rpartition('.')[0]}.".lstrip("."))
            }
    return more | dict(changes)


def _choices_of_blocks(places: Sequence[tuple[str, Any]], shortened: Shortened) -> Choices:
    keep, before = shortened.kept, shortened.blocks
    lists = {p: [v[i] for i in keep] for p, v in places if isinstance(v, list) and len(v) == before}
    counts = [p for p, v in places if type(v) is int and v == before]
    # Rarely needed, so the option without it comes first.
    numbers = _some(_renumbered(places, before, len(keep)))[::-1]
    return [numbers, [dict.fromkeys(chosen, len(keep)) for chosen in _subsets(counts)], _some(lists)]


def leading_of(config: Mapping[str, Any], resized: Resized) -> Iterator[dict[str, Any]]:
    """Yield changes of settings that give a kind of blocks by number: how many lead (a mixture's dense ones), or a list."""
    for own, (place, value) in product(resized.lists, places_in(config)):
        keep, new = own.kept, value
        if type(value) is int and 0 < value <= own.blocks:
            new = sum(index < value for index in keep)
        elif isinstance(value, list) and all(type(one) is int and 0 <= one < own.blocks for one in value):
            new = [keep.index(one) for one in value if one in keep]
        if new != value:
            yield {place: new}


def _renumbered(places: Sequence[tuple[str, Any]], blocks: int, left: int) -> dict[str, Any]:
    """Return new values of lists that name the last block counted from one, or have one entry more than there are blocks."""

    def last(item: Any) -> Any:
        if isinstance(item, str) and item.endswith(str(blocks)):
            return f"{item.removesuffix(str(blocks))}{left}"
        return left if type(item) is int and item == blocks else item

    found = {p: v[: left + 1] if len(v) == blocks + 1 else [*map(last, v)] for p, v in places if isinstance(v, list)}
    return {place: value for place, value in found.items() if value != dict(places)[place]}


def _ratios(places: Sequence[tuple[str, Any]], old: int, new: int) -> Iterator[dict[str, Any]]:
    """Yield settings that give a size as a multiple of another, such as channels of the model's width."""
    whole = {value for _, value in places if type(value) is int and value > 0}
    for place, value in places:
        if type(value) in (int, float) and value > 0 and old / value in whole:
            ratio = ratio_of(new, old / value)
            yield {place: int(ratio) if ratio.is_integer() else ratio}


def ratio_of(new: int, width: float) -> float:
    """Return the factor that turns a width into a number, whether the product is rounded down or to the nearest."""
    ratio = new / width
    return ratio if int(width * ratio) == new else (new + 0.25) / width


def _subsets(places: Sequence[str]) -> list[list[str]]:
    """Return combinations of places: heads with the key-value heads beside them, one place, those of one name, all, all but one.

    With compressed keys and values no shape shows the number of heads, though eager attention uses it.
    """
    key_values = {p.rpartition(".")[0]: p for p in places if p.endswith(("key_value_heads", "kv_heads"))}
    holders = [(p, key_values.get(p.rpartition(".")[0])) for p in places if "head" in p.rpartition(".")[2]]
    pairs = [[place, beside] for place, beside in holders if beside is not None and place != beside]
    alone = [[place] for place in places]
    if len(places) < 2:
        return alone
    but_one = [[other for other in places if other != one] for one in places] if len(places) > 2 else []
    # An encoder and its decoder have configurations of their own.
    names = dict.fromkeys(place.rpartition(".")[2] for place in places)
    named = [[place for place in places if place.rpartition(".")[2] == name] for name in names]
    heads = [place for place in places if "head" in place.rpartition(".")[2]]
    every = [*pairs, *alone, *(own for own in (*named, heads) if len(own) > 1), [*places], *but_one]
    return [own for index, own in enumerate(every) if own not in every[:index]]


def _some(lists: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return combinations of lists: all, each alone, none."""
    alone = [{place: value} for place, value in lists.items()] if len(lists) > 1 else []
    return [dict(lists), *alone, {}] if lists else []
