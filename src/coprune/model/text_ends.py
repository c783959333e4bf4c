"""Tokens that end a text, and what fills a batch of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def ends_among(*said: Any) -> tuple[int, ...]:
    """Tokens that end a text, each once. said: ids, lists of ids, or None, as tokenizers and configurations have them."""
    found = [end for one in said for end in (one if isinstance(one, list | tuple) else [one])]
    return tuple(dict.fromkeys(end for end in found if isinstance(end, int)))


def filling(pad: Any, ends: Sequence[int]) -> int:
    """What fills a batch: the tokenizer's own token for that, else one that ends a text, else the first."""
    return pad if isinstance(pad, int) else next(iter(ends), 0)
