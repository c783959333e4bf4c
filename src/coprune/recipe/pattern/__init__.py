"""Patterns of zeros, one file each, in one table, and the parser of their names.

Nothing heavy is imported before a mask is chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coprune.base.errors import BadInput
from coprune.recipe.pattern.base import NM, Grid, Group, Pattern, Target, Unstructured

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NM", "PATTERNS", "Grid", "Group", "Pattern", "Target", "Unstructured", "find_pattern", "parse_pattern"]

PATTERNS: dict[str, type[Pattern]] = {
    "unstructured": Unstructured,
    "N:M": NM,
}
"""Patterns by name, from the most general to the most specific."""


def parse_pattern(text: str) -> Pattern:
    """Read a pattern, such as `unstructured` or `2:4`. Raises BadInput on anything else."""
    for kind in PATTERNS.values():
        if (pattern := kind.read(text)) is not None:
            return pattern
    usages = " or ".join(kind.usage for kind in PATTERNS.values())
    raise BadInput(f"unknown pattern {text!r}", field="pattern", value=text, fix=f"use {usages}")


def find_pattern(keep: Tensor) -> Pattern:
    """Return the most specific pattern that a mask (O × I bool) follows."""
    found = [pattern for kind in PATTERNS.values() if (pattern := kind.found_in(keep)) is not None]
    return found[-1]
