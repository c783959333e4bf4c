"""Refinements of a pruned matrix, one file each, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coprune.base.options import one_of
from coprune.pruning.refine.base import Refinement
from coprune.pruning.refine.refit import Refit
from coprune.pruning.refine.swaps import Swaps
from coprune.recipe.choice import Choice

__all__ = ["REFINEMENTS", "Refinement", "refinement_named"]

REFINEMENTS: dict[str, Refinement] = {
    "refit": Refit(),
    "swaps": Swaps(),
}


def refinement_named(asked: Choice | str | Mapping[str, Any]) -> Refinement:
    """Look a refinement up and set its options.

    Args:
        asked: a name, or a name with options (`refit:rounds=10`), the fields of its dataclass.

    Raises:
        BadInput: an unknown name or option, or a value of the wrong type or out of range.
    """
    choice = Choice.of(asked)
    return one_of(REFINEMENTS, "refinement", choice.name, choice.options, "refine")
