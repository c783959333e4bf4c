"""Text that others wrote, put into Markdown so that it stays text."""

from __future__ import annotations

import re
from typing import Any

import yaml


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
