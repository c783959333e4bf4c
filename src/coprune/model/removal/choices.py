"""What a configuration may say of a model that has got smaller, where nobody knows what its numbers are called.

Every number that is as large as what was cut may be another one now, or follow from others; which of all these is right shows
when the model is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coprune.model.checkpoint.companions import places_in


@dataclass
class Resized:
    """What a configuration has to tell otherwise."""

    sizes: Sequence[tuple[int, int]] = ()
    """Old numbers with the new ones; two things may have been as large as each other, and are not any more."""
    blocks: int = 0
    """How many there were."""
    dropped: Sequence[int] = ()
    extra: dict[str, int] = field(default_factory=dict)
    """What may have to be said, though it was not: the width of a head, which followed from their number."""
    arguments: dict[str, float] = field(default_factory=dict)
    """The same for a library that makes the model by the name of an architecture (timm), which stands for all numbers."""


_EXPERTS = re.compile(r"(?!.*shared)(?:\w+_)?n(?:um)?_(?:\w+_)?experts")
"""Names under which programs look for the number of experts that tokens are routed to."""
Choices = list[list[dict[str, Any]]]
"""For each number that is another now, what may tell of it."""


def choices_of(config: Mapping[str, Any], resized: Resized) -> tuple[Choices, Choices, Choices]:
    """What may tell of the blocks that went, what of everything that is smaller, and what has to be said besides."""
    places = [*places_in(config)]
    blocks, sizes, unsaid = _of_blocks(places, resized) if resized.dropped else [], Choices(), Choices()
    for old, new in resized.sizes:
        single = [p for p, v in places if type(v) is int and v == old]
        equal = {p: [new] * len(v) for p, v in places if isinstance(v, list) and v and all(one == old for one in v)}
        # In the end without a change, since some sizes follow from others, and where nothing was said.
        silent: list[dict[str, Any]] = [{p: new} for p, v in places if v is None]
        ratios = [] if single else [*_ratios(places, old, new)]
        sizes += [[*(dict.fromkeys(chosen, new) for chosen in _subsets(single)), *ratios, {}, *silent], _some(equal)]
    for key, value in resized.extra.items():
        # What a configuration does not say follows from others there, which change now.
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
    """Return changes that also reach every other number of experts beside or above one that they change.

    Other programs read numbers that this model's code does not, and one configuration must not hold two counts.
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


def _of_blocks(places: Sequence[tuple[str, Any]], resized: Resized) -> Choices:
    keep = [index for index in range(resized.blocks) if index not in resized.dropped]
    # Tokens that end a text may be as many as blocks, by chance; no shape and no logit tells that one is missing.
    own = [(p, v) for p, v in places if isinstance(v, list) and not p.endswith(("token_id", "token_ids"))]
    lists = {p: [v[i] for i in keep] for p, v in own if len(v) == resized.blocks}
    counts = [p for p, v in places if type(v) is int and v == resized.blocks]
    # Rarely needed, so the first option, without it, is tried with everything else.
    numbers = _some(_renumbered(places, resized.blocks, len(keep)))[::-1]
    return [numbers, [dict.fromkeys(chosen, len(keep)) for chosen in _subsets(counts)], _some(lists)]


def leading_of(config: Mapping[str, Any], resized: Resized) -> Iterator[dict[str, Any]]:
    """Yield what may tell of blocks of a kind by their numbers: how many blocks lead (the dense ones of a mixture), or a list."""
    keep = [index for index in range(resized.blocks) if index not in resized.dropped]
    for place, value in places_in(config):
        new = value
        if type(value) is int and 0 < value <= resized.blocks:
            new = sum(index < value for index in keep)
        elif isinstance(value, list) and all(type(one) is int and 0 <= one < resized.blocks for one in value):
            new = [keep.index(one) for one in value if one in keep]
        if new != value:
            yield {place: new}


def _renumbered(places: Sequence[tuple[str, Any]], blocks: int, left: int) -> dict[str, Any]:
    """Lists that name the last block by its number, counted from one, or all of them and what is before."""

    def last(item: Any) -> Any:
        if isinstance(item, str) and item.endswith(str(blocks)):
            return f"{item.removesuffix(str(blocks))}{left}"
        return left if type(item) is int and item == blocks else item

    found = {p: v[: left + 1] if len(v) == blocks + 1 else [*map(last, v)] for p, v in places if isinstance(v, list)}
    return {place: value for place, value in found.items() if value != dict(places)[place]}


def _ratios(places: Sequence[tuple[str, Any]], old: int, new: int) -> Iterator[dict[str, Any]]:
    """Numbers that are said as multiples of another one, as of channels for each of the model's width."""
    whole = {value for _, value in places if type(value) is int and value > 0}
    for place, value in places:
        if type(value) in (int, float) and value > 0 and old / value in whole:
            ratio = ratio_of(new, old / value)
            yield {place: int(ratio) if ratio.is_integer() else ratio}


def ratio_of(new: int, width: float) -> float:
    """What a width is multiplied with to give a number, when the product is rounded down or to the nearest."""
    ratio = new / width
    return ratio if int(width * ratio) == new else (new + 0.25) / width


def _subsets(places: Sequence[str]) -> list[list[str]]:
    """Heads with the key-value heads beside them, one place alone, all of them, all but one.

    Where keys and values are made of compressed ones no shape shows their number, though eager attention goes by it.
    """
    key_values = {p.rpartition(".")[0]: p for p in places if p.endswith(("key_value_heads", "kv_heads"))}
    holders = [(p, key_values.get(p.rpartition(".")[0])) for p in places if "head" in p.rpartition(".")[2]]
    pairs = [[place, beside] for place, beside in holders if beside is not None and place != beside]
    alone = [[place] for place in places]
    if len(places) < 2:
        return alone
    but_one = [[other for other in places if other != one] for one in places] if len(places) > 2 else []
    every = [*pairs, *alone, [*places], *but_one]
    return [own for index, own in enumerate(every) if own not in every[:index]]


def _some(lists: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All lists, each alone, none."""
    alone = [{place: value} for place, value in lists.items()] if len(lists) > 1 else []
    return [dict(lists), *alone, {}] if lists else []
