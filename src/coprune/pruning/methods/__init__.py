"""Pruning methods, one file each, in one table."""

from __future__ import annotations

from collections.abc import Mapping

from coprune.base.errors import unknown_name
from coprune.base.options import with_options
from coprune.pruning.methods.ablate import Ablate
from coprune.pruning.methods.admm import ADMM
from coprune.pruning.methods.alps import ALPS
from coprune.pruning.methods.base import Method, Pruned
from coprune.pruning.methods.dsnot import DSnoT
from coprune.pruning.methods.magnitude import Magnitude
from coprune.pruning.methods.ria import RIA
from coprune.pruning.methods.sparsegpt import SparseGPT
from coprune.pruning.methods.wanda import Wanda
from coprune.pruning.methods.wanda_variant import WandaVariant

__all__ = ["METHODS", "Method", "Pruned", "method_named"]

METHODS: dict[str, Method] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "wanda_variant": WandaVariant(),
    "sparsegpt": SparseGPT(),
    "ablate_mag_seq": Ablate(score="magnitude", selection="sequential"),
    "ablate_wanda_seq": Ablate(score="wanda", selection="sequential"),
    "ablate_mag_iter": Ablate(score="magnitude", selection="iterative"),
    "ablate_wanda_iter": Ablate(score="wanda", selection="iterative"),
    "ria": RIA(),
    "dsnot": DSnoT(),
    "admm": ADMM(),
    "alps": ALPS(),
}


def method_named(name: str, options: Mapping[str, object] | None = None) -> Method:
    """Look a method up and set its options (fields of its dataclass).

    Raises BadInput for an unknown name or option, or a value of the wrong type or out of range.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS, field="method")
    return with_options(METHODS[name], "method", name, options or {})
