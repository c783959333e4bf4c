"""How one budget of zeros is spread over the matrices: allocations, one file each, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coprune.base.errors import BadInput, unknown_name
from coprune.base.options import with_options
from coprune.base.words import Set
from coprune.pruning.allocation.alpha import Alpha
from coprune.pruning.allocation.base import Allocation, Unit
from coprune.pruning.allocation.by_file import ByFile
from coprune.pruning.allocation.error import ByError
from coprune.pruning.allocation.fisher import ByFisher
from coprune.pruning.allocation.owl import OWL
from coprune.pruning.allocation.search import ALLOCATION_FILE, LevelSearch
from coprune.pruning.allocation.uniform import Uniform
from coprune.recipe.choice import Choice

__all__ = ["ALLOCATIONS", "SEARCHES", "Allocation", "LevelSearch", "Unit", "allocation_named", "spread_named"]

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Uniform(),
    "owl": OWL(),
    "alpha": Alpha(),
    "error": ByError(),
    "fisher": ByFisher(),
}
"""Every allocation that is made from one look at the dense model, by its name."""
SEARCHES: dict[str, LevelSearch] = {"search": LevelSearch()}
"""Those that try several."""


def spread_named(asked: Choice | str | Mapping[str, Any]) -> Allocation | LevelSearch:
    """Look up how zeros are spread, by one look or by a search.

    Args:
        asked: a name, a name with options (`owl:spread=0.1,threshold=7`), or a YAML file.

    Raises:
        BadInput: an unknown name or option, a value of the wrong type or out of range, or an unreadable file.
    """
    choice = Choice.of(asked)
    if choice.is_file:
        return ByFile.read(Path(choice.name))
    if choice.name in SEARCHES:
        search = with_options(SEARCHES[choice.name], "allocation", choice.name, choice.options)
        search.require_end()
        return search
    if choice.name not in ALLOCATIONS:
        known = [*ALLOCATIONS, *SEARCHES, "FILE.yaml"]
        raise unknown_name("allocation", choice.name, known, field="allocation")
    return with_options(ALLOCATIONS[choice.name], "allocation", choice.name, choice.options)


def allocation_named(asked: Choice | str | Mapping[str, Any]) -> Allocation:
    """Look up an allocation that is made from one look. Raises BadInput as `spread_named`, and for a search."""
    found = spread_named(asked)
    if isinstance(found, LevelSearch):
        raise BadInput(
            "only a run can search for an allocation",
            field="allocation",
            value=str(asked),
            fix=("look at what one found: ", Set("allocation", f"RUN/{ALLOCATION_FILE}")),
        )
    return found
