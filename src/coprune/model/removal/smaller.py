"""The smaller model that edits make: its configuration, and the model itself.

What becomes of the configuration is not known by name. Every number in it that is as large as what was cut is tried, and
taken if the model that results has exactly the shapes that are needed.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, product
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from coprune.model.checkpoint.companions import places_in, put_into
from coprune.model.checkpoint.conversion import load_tensors
from coprune.model.checkpoint.load import prepare, quiet_transformers
from coprune.model.checkpoint.names import is_below_any
from coprune.model.removal.choices import Choices, Resized, choices_of, leading_of, with_all_counts
from coprune.model.transformers_private import (
    conversions_to_revert,
    revert_conversion,
    saved_tensors,
    set_conversions_to_revert,
)
from coprune.model.walk.record import input_device

Layout = Callable[[PreTrainedModel, dict[str, Tensor]], dict[str, Tensor]]
"""Gives a model's tensors the names and shapes of a checkpoint."""
MOST_CANDIDATES = 500
"""Configurations that are tried; each costs as long as it takes to make the modules."""


def possible_changes(
    model: PreTrainedModel, shapes: Mapping[str, Sequence[int]], resized: Resized, layout: Layout | None = None
) -> Iterator[dict[str, Any]]:
    """What the configuration may say for the model to have these shapes, the likeliest first.

    Args:
        model: as it was.
        shapes: of the smaller checkpoint's tensors.
        resized: what to look for.
        layout: gives a smaller model's tensors the names that `shapes` has; without it, as it would be saved.

    Yields:
        New values by their places, with dots between; only what differs.
    """
    wanted = {name: tuple(shape) for name, shape in shapes.items()}
    # Of tied weights only one is saved, which a model without weights does not show.
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
    """Return what the configuration itself says against new sizes that are said in the likeliest way; None if nothing."""
    config = model.config.to_dict()
    blocks, sizes, _ = choices_of(config, resized)
    told = [[one for one in options if one] for options in [*blocks, *sizes]]
    # A head may be as wide as there are heads.
    likeliest = [min(options, key=lambda one: not all(p.endswith("heads") for p in one)) for options in told if options]
    changes = {place: value for one in likeliest for place, value in one.items()}
    try:
        type(model.config).from_dict(_changed(config, changes))
    except Exception as error:  # whatever its code says to numbers that do not go together
        said = str(error.__cause__ or error).strip().splitlines()[-1].strip()
        numbers = ", ".join(f"{place}={value}" for place, value in changes.items())
        return f"{type(model.config).__name__} refuses {numbers}: {said}"
    return None


def _candidates(
    making: _Making, wanted: Mapping[str, tuple[int, ...]], unsaved: Container[str], resized: Resized
) -> Iterator[dict[str, Any]]:
    """What may be said: first what gives the blocks that are left, with each of these what gives the sizes; then all together."""
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
    """What gives the blocks that are left, by the names of their tensors; last what also says otherwise which are of a kind."""
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
    """Names up to their first number."""
    return {found[0] for name in names if (found := re.match(r"(?:.*?\.)?\d+(?=\.)", name))}


def _outline(names: Iterable[str]) -> set[str]:
    """Names up to their second number: what blocks there are, whatever of experts there is in them."""
    return {re.sub(r"^((?:.*?\.)?\d+\..*?)\.\d+(\.|$).*", r"\1", name) for name in names}


def _of_sizes(
    making: _Making,
    first: Mapping[str, Any],
    choices: tuple[Choices, Choices],
    wanted: Mapping[str, tuple[int, ...]],
) -> Iterator[dict[str, Any]]:
    """What gives the sizes, and what has to be said besides.

    Where there are many ways, first what by itself makes shapes that are wanted, then also what by itself makes no other ones.
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
    """What makes no shape that nobody wants when it is said alone. is_needed: and makes one that is wanted, if it is anything."""
    config, silent = _changed(making.before, first), {p for p, value in places_in(making.before) if value is None}
    whole = making.shapes(config)

    def fits(one: Mapping[str, Any]) -> bool:
        if not one or (is_needed and one.keys() & silent):
            return not one
        changed = making.shapes(_changed(config, one))
        return _may_fit(whole, changed, wanted) and not (is_needed and changed == whole)

    return [[*filter(fits, options)] for options in sizes]


def _together(choices: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """One of each together, at most so many."""
    for chosen in islice(product(*choices), MOST_CANDIDATES):
        yield {place: value for part in chosen for place, value in part.items()}


def _may_fit(
    whole: Mapping[str, tuple[int, ...]], changed: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether every dimension that changes becomes what is wanted, and nothing goes; also if there can be no such model alone."""
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
    """How a model is made with other configurations."""

    model: PreTrainedModel
    layout: Layout | None

    @cached_property
    def before(self) -> dict[str, Any]:
        """The configuration as it was."""
        found: dict[str, Any] = self.model.config.to_dict()
        return found

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes of the checkpoint of a model with another configuration; none if there can be no such model."""
        try:
            small = _skeleton(self.model, config)
        except Exception:  # whatever a model's code says to numbers that do not go together
            return {}
        tensors = (self.layout or revert_conversion)(small, small.state_dict())
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _skeleton(model: PreTrainedModel, config: Mapping[str, Any]) -> PreTrainedModel:
    made = type(model.config).from_dict(dict(config))
    made._attn_implementation = model.config._attn_implementation
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        small: PreTrainedModel = type(model)(made)
    # What the model was loaded by says how its checkpoint names things, timm's for one.
    set_conversions_to_revert(small, conversions_to_revert(model))
    return small


def smaller_skeleton(model: PreTrainedModel, changes: Mapping[str, Any]) -> PreTrainedModel:
    """The smaller model without its weights. changes: of the configuration, as `possible_changes` gives them."""
    return _skeleton(model, _changed(model.config.to_dict(), changes))


def fill(small: PreTrainedModel, below: nn.Module, tensors: Mapping[str, Tensor], like: PreTrainedModel) -> None:
    """Give the parameters below a module of a skeleton their values.

    Args:
        small: the skeleton.
        below: it, or one of its modules.
        tensors: of its checkpoint.
        like: the model whose dtype and device they get.
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
    """Give a skeleton what lies outside the blocks, which are the same parameters and buffers then. blocks: of the model."""
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
    """The smaller model in memory, ready to be run.

    Args:
        model: as it was, which lends its settings for generation.
        tensors: of the smaller checkpoint.
        changes: of the configuration, as `possible_changes` gives them.
    """
    small = smaller_skeleton(model, changes)
    fill(small, small, tensors, model)
    with quiet_transformers():
        small.tie_weights()
    if hasattr(model, "generation_config"):  # classifiers generate nothing
        small.generation_config = model.generation_config
    small.name_or_path = model.name_or_path
    prepared: PreTrainedModel = prepare(small)
    return prepared
