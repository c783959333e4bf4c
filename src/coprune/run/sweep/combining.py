"""How lists combine: methods that are listed with their options, and how many runs are too many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from coprune.base.errors import BadInput
from coprune.recipe.choice import Choice, split_choice
from coprune.recipe.flat import PRESET

_MOST_RUNS = 10_000


def methods_with_options(settings: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Take apart methods that are listed with their options, and list every combination of options that have lists.

    Returns the settings, in which `method` and `options` are then lists that go in step, and whether they are.
    """
    methods, options = settings.get("method"), settings.get("options")
    if not isinstance(methods, list):
        lists = isinstance(options, Mapping) and any(isinstance(value, list) for value in options.values())
        return (settings | {"options": _combined(options)} if lists and options else settings), False
    if not any(isinstance(one, Mapping | Choice) or (isinstance(one, str) and ":" in one) for one in methods):
        return settings, False
    if options is not None:
        raise BadInput("options are said twice, once with the methods", field="options", fix="leave one out")
    pairs = [(one["name"], own) for one in map(_split, methods) for own in _combined(one["options"])]
    taken = {"method": [name for name, _ in pairs], "options": [own for _, own in pairs]}
    # In the place of the methods, so that the order of the lists stays.
    rest = [({name: value} if name != "method" else taken) for name, value in settings.items()]
    return {name: value for part in rest for name, value in part.items()}, True


def included(entry: dict[str, Any], with_options: bool) -> dict[str, Any]:
    """What an included entry says. with_options: whether methods are listed with options, which are not those of another."""
    own = {"options": {}, **entry} if with_options and "method" in entry else entry
    return own if isinstance(own.get("method"), list) else methods_with_options(own)[0]


def added_to(settings: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an included entry's runs: its own, and the sweep's; a preset brings a method of its own."""
    gone = ("method", "options") if entry.get(PRESET) is not None and "method" not in entry else ()
    return {**{name: value for name, value in settings.items() if name not in gone}, **entry}


def excluded(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries that exclude together what one excludes in which methods are listed with their options."""
    taken, paired = methods_with_options(entry)
    if not paired:
        return [taken]
    rest = {name: value for name, value in taken.items() if name not in ("method", "options")}
    pairs = zip(taken["method"], taken["options"], strict=True)
    return [rest | {"method": name} | ({"options": own} if own else {}) for name, own in pairs]


def _split(method: Any) -> dict[str, Any]:
    if not isinstance(method, Mapping):
        choice = Choice.of(method)
        return {"name": choice.name, "options": choice.options}
    try:
        return {"name": "wanda", **split_choice(method)}
    except ValueError as error:
        raise BadInput(f"method: {error}", field="method", value=method) from None


def _combined(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in options.values()]
    require_few(len(one) for one in lists)
    return [dict(zip(options, values, strict=True)) for values in product(*lists)]


def require_few(lengths: Iterable[int]) -> None:
    """Raise BadInput where lists combine to more runs than anybody waits for; it is said before they are listed."""
    runs = math.prod(lengths)
    if runs > _MOST_RUNS:
        raise BadInput(
            f"the lists combine to {runs:,} runs, and a sweep has {_MOST_RUNS:,} at most",
            field="sweep",
            fix="shorten them, or let some go in step with zip",
        )
