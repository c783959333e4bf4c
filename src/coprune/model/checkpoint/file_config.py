"""Changes of a configuration in terms of its file, which may use older key names or another nesting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from coprune.model.checkpoint.companions import places_in, put_into

Read = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Returns the model's configuration for the content of a file."""


def changes_in_file(
    file: Mapping[str, Any], config: Any, changes: Mapping[str, Any], read: Read
) -> dict[str, Any] | None:
    """Return changes of a model's configuration as changes of its file.

    Args:
        file: the content of `config.json`.
        config: the model's own configuration, as it was read from there.
        changes: new values by their places in `config`.
        read: reads a file's content as that of `config` was read.

    Returns:
        New values by their places in the file; None if no key of it gives them.
    """
    before = dict(places_in(config.to_dict()))
    for holder in ("", *_holders(file)):
        worded: dict[str, Any] = {}
        for place, new in changes.items():
            worded |= dict.fromkeys(_places(file, holder, _names(config, place), before.get(place)), new)
        content = copy.deepcopy(dict(file))
        put_into(content, worded)
        try:
            found = dict(places_in(read(content)))
        except Exception:  # a configuration's code can raise anything for a misplaced value
            continue
        if all(found.get(place) == new for place, new in changes.items()):
            return worded
    return None


def _holders(file: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield the paths of the configurations inside a configuration, each with a final dot."""
    for key, value in file.items():
        if isinstance(value, Mapping):
            yield f"{above}{key}."
            yield from _holders(value, f"{above}{key}.")


def _names(config: Any, place: str) -> list[str]:
    """Return a key with its aliases in the configuration's class."""
    *path, key = place.split(".")
    for part in path:
        config = getattr(config, part, None)
    others = [old for old, own in (getattr(config, "attribute_map", None) or {}).items() if own == key]
    return [".".join([*path, name]) for name in (key, *others)]


def _places(file: Mapping[str, Any], holder: str, names: list[str], old: Any) -> list[str]:
    """Return the keys of a holder that have the old value: all names that are present, else the first."""
    said = dict(places_in(file))
    there = [f"{holder}{name}" for name in names if f"{holder}{name}" in said]
    return [place for place in there if said[place] == old] or there or [f"{holder}{names[0]}"]
