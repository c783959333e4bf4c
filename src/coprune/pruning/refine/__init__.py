"""Refinements of a pruned matrix, one file each, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coprune.base.errors import unknown_name
from coprune.base.options import with_options
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
    if choice.name not in REFINEMENTS:
        raise unknown_name("refinement", choice.name, REFINEMENTS, field="refine")
    return with_options(REFINEMENTS[choice.name], "refinement", choice.name, choice.options)
