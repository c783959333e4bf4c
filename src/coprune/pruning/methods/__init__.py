"""Pruning methods, one file each, in one table, and the registration of further ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from coprune.base.errors import BadInput, unknown_name
from coprune.base.method_options import with_options
from coprune.model.walk.statistics import Gram, InputMoments, InputNorm, Statistic
from coprune.pruning.methods.ablate import Ablate
from coprune.pruning.methods.admm import ADMM
from coprune.pruning.methods.alps import ALPS
from coprune.pruning.methods.base import Method, Pruned, apply_keep
from coprune.pruning.methods.dsnot import DSnoT
from coprune.pruning.methods.entry_points import brought_methods, checked_method, names_brought, tell
from coprune.pruning.methods.magnitude import Magnitude
from coprune.pruning.methods.ria import RIA
from coprune.pruning.methods.sparsegpt import SparseGPT
from coprune.pruning.methods.wanda import Wanda
from coprune.pruning.methods.wanda_variant import WandaVariant
from coprune.recipe.pattern import Target

__all__ = [
    "METHODS",
    "Gram",
    "InputMoments",
    "InputNorm",
    "Method",
    "Pruned",
    "Statistic",
    "Target",
    "all_methods",
    "apply_keep",
    "find_method",
    "method_named",
    "origin_of",
    "register_method",
]

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


_registered: dict[str, Method] = {}


def register_method(name: str, method: Method | type[Method]) -> None:
    """Register your own method in this process, so that runs can name it.

    A method that an installed package declares under the entry-point group `coprune.methods` needs no call and is known in
    every process.

    Args:
        name: the name to register.
        method: a frozen dataclass with `statistic` and `prune`, see `Method`; an instance, or the class for its defaults.

    Raises:
        BadInput: the name is taken or invalid, or the object is not a method.
    """
    _registered[name] = checked_method(name, method, {*METHODS, *_registered, *names_brought()})


def all_methods() -> dict[str, Method]:
    """Return every method by name: coprune's own, those of installed packages, and registered ones."""
    brought = brought_methods(frozenset(METHODS))
    for problem in brought.problems.values():
        tell(problem)
    return METHODS | brought.methods | _registered


def origin_of(name: str) -> str | None:
    """Return the package or module of a method that is not coprune's own, else None."""
    if name in _registered:
        return type(_registered[name]).__module__
    return None if name in METHODS else brought_methods(frozenset(METHODS)).packages[name]


def is_option(name: str) -> bool:
    """Return whether some method has an option of this name."""
    # Other packages are loaded only for names unknown without them.
    return name in _options_of(METHODS | _registered) or name in option_names()


def option_names() -> set[str]:
    """Return the names of all methods' options."""
    return _options_of(all_methods())


def _options_of(methods: Mapping[str, Method]) -> set[str]:
    return {field.name for method in methods.values() for field in dataclasses.fields(method)}


def find_method(name: str) -> Method:
    """Return a method by name. Raises BadInput for an unknown name, or one whose package fails to load."""
    # Other packages are loaded only for names unknown without them.
    known = METHODS | _registered
    if name in known:
        return known[name]
    brought = brought_methods(frozenset(METHODS))
    if name in brought.methods:
        return brought.methods[name]
    if name in brought.problems:
        raise BadInput(f"the method {name!r} cannot be used: {brought.problems[name]}", field="method", value=name)
    raise unknown_name("method", name, all_methods(), field="method")


def method_named(name: str, options: Mapping[str, object] | None = None) -> Method:
    """Return a method by name with its options set.

    Args:
        name: a name in `all_methods`.
        options: fields of its dataclass.

    Raises:
        BadInput: an unknown name or option, or a value of the wrong type or out of range.
    """
    return with_options(find_method(name), "method", name, options or {})
