"""How one budget of zeros is spread over the matrices: allocations, one file each, in one table."""

from __future__ import annotations

from pathlib import Path

from coprune.base.errors import unknown_name
from coprune.base.options import parse_options, with_options
from coprune.pruning.allocation.alpha import Alpha
from coprune.pruning.allocation.base import Allocation, Unit
from coprune.pruning.allocation.by_file import ByFile
from coprune.pruning.allocation.error import Error
from coprune.pruning.allocation.owl import OWL
from coprune.pruning.allocation.uniform import Uniform

__all__ = ["ALLOCATIONS", "Allocation", "Unit", "allocation_named", "is_file"]

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Uniform(),
    "owl": OWL(),
    "alpha": Alpha(),
    "error": Error(),
}


def allocation_named(text: str) -> Allocation:
    """Look an allocation up: a name, a name with options (`owl:spread=0.1,threshold=7`), or a YAML file.

    Raises BadInput for an unknown name or option, a value of the wrong type or out of range, or an unreadable file.
    """
    if is_file(text):
        return ByFile.read(Path(text))
    name, options = parse_options("allocation", text)
    if name not in ALLOCATIONS:
        raise unknown_name("allocation", name, [*ALLOCATIONS, "FILE.yaml"])
    return with_options(ALLOCATIONS[name], "allocation", name, options)


def is_file(text: str) -> bool:
    """Whether an allocation is given by a file."""
    return text.endswith((".yaml", ".yml"))
