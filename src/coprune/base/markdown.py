"""Escaping of foreign text for Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

# A path from the root, of at least two parts; not within a word, an address or a relative path.
_PLACE = re.compile(r"(?<![\w/:.~\-])/(?:[^\s/,;:'\"`|()\[\]\\<>]+/)+([^\s/,;:'\"`|()\[\]\\<>]+)")


# A confidence interval, whose brackets open no link.
_INTERVAL = re.compile(r"(\[[-+\d., ]+\](?![(\[]))")


def inline(text: str) -> str:
    """Return text on one line that neither ends a table cell nor opens markup."""
    pieces = _INTERVAL.split(" ".join(text.split()))
    pieces[::2] = [re.sub(r"([\\`|<>\[\]*])", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces)


def fenced(content: str, language: str) -> str:
    """Return a code block with a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"


def front_matter(facts: Mapping[str, Any]) -> str:
    """Return a card's metadata, between its two lines of dashes, with texts quoted where YAML needs it."""
    return f"---\n{yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True, width=10_000)}---\n"


def hub_id(name: str) -> str | None:
    """Return a name as a Hub id, `owner/name`, or None if it is a path or a local folder."""
    known = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return name if known else None


def values_in(settings: Any) -> Iterable[str]:
    """Yield every text in nested settings."""
    if isinstance(settings, dict):
        for value in settings.values():
            yield from values_in(value)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from values_in(value)
    elif isinstance(settings, str):
        yield settings


def without_places(text: str, settings: Any) -> str:
    """Return text with local files reduced to their names, since paths are private.

    settings: may have paths with spaces, which cannot be recognised in the text alone.
    """
    known = {value for value in values_in(settings) if value.startswith("/") and len(Path(value).parts) > 2}
    for place in sorted(known, key=len, reverse=True):
        text = text.replace(place, Path(place).name)
    return _PLACE.sub(r"\1", text)
