"""Text that others wrote, put into Markdown so that it stays text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

# A path from the root, of at least two parts; not within a word, an address or a relative path.
_PLACE = re.compile(r"(?<![\w/:.~\-])/(?:[^\s/,;:'\"`|()\[\]\\<>]+/)+([^\s/,;:'\"`|()\[\]\\<>]+)")


def inline(text: str) -> str:
    """Text on one line, which ends no table's cell and opens nothing."""
    return re.sub(r"([\\`|<>\[\]*])", r"\\\1", " ".join(text.split()))


def fenced(content: str, language: str) -> str:
    """A block of code, whose fence is longer than any within it."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"


def field(name: str, value: Any) -> str:
    """A line of the metadata at the head of a card, quoted where YAML asks for it."""
    return yaml.safe_dump({name: value}, allow_unicode=True, width=10_000).rstrip("\n")


def hub_id(name: str) -> str | None:
    """A name as one of the Hub, `owner/name`; None where it is a path, or a folder of this machine goes by it."""
    known = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return name if known else None


def values_in(settings: Any) -> Iterable[str]:
    """Every text in nested settings."""
    if isinstance(settings, dict):
        for value in settings.values():
            yield from values_in(value)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from values_in(value)
    elif isinstance(settings, str):
        yield settings


def without_places(text: str, settings: Any) -> str:
    """Text in which files of this machine go by their names alone, since where they lay is nobody's business.

    settings: in which paths may be that hold spaces, and so are known from them alone.
    """
    known = {value for value in values_in(settings) if value.startswith("/") and len(Path(value).parts) > 2}
    for place in sorted(known, key=len, reverse=True):
        text = text.replace(place, Path(place).name)
    return _PLACE.sub(r"\1", text)
