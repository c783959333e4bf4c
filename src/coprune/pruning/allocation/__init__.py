"""Allocations of one sparsity over the matrices: one file each, and a table of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coprune.base.errors import unknown_name
from coprune.base.method_options import with_options
from coprune.pruning.allocation.allocation import Allocation, Uniform, Unit
from coprune.pruning.allocation.by_file import ByFile
from coprune.pruning.allocation.fisher import ByFisher
from coprune.pruning.allocation.owl import OWL
from coprune.recipe.choice import Choice

__all__ = ["ALLOCATIONS", "Allocation", "Unit", "allocation_named"]

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Uniform(),
    "owl": OWL(),
    "fisher": ByFisher(),
}
"""Every allocation by name."""


def allocation_named(asked: Choice | str | Mapping[str, Any]) -> Allocation:
    """Return an allocation by name.

    Args:
        asked: a name, a name with options (`owl:spread=0.1,threshold=7`), or a YAML file.

    Raises:
        BadInput: an unknown name or option, a value of the wrong type or out of range, or an unreadable file.
    """
    choice = Choice.of(asked)
    if choice.is_file:
        return ByFile.read(Path(choice.name))
    if choice.name not in ALLOCATIONS:
        known = [*ALLOCATIONS, "FILE.yaml"]
        raise unknown_name("allocation", choice.name, known, field="allocation")
    return with_options(ALLOCATIONS[choice.name], "allocation", choice.name, choice.options)
