"""Formats of figures and names on pages and cards."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping


def number(value: float) -> str:
    """Return a perplexity with its significant digits."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"


def seconds(value: float) -> str:
    """Return a time in a fitting unit."""
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def short(count: int) -> str:
    """Return a number of weights: 134.5 M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g} {letter}"
    return str(count)


# The GGUF file of a package, as `locate` appends it to a source; folders may contain spaces and parentheses.
_CARRIED = re.compile(r" \([^()/]+\.gguf\)$")


def base_of(source: str) -> str:
    """Return a source without the package's file: a path, or a name on the Hub."""
    return _CARRIED.sub("", source)


def name_of(source: str) -> str:
    """Return the last component of a source."""
    return base_of(source).rstrip("/").rpartition("/")[2]


def versions_line(versions: Mapping[str, str]) -> str:
    """Return packages with their versions: torch 2.9, transformers 5.21."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
