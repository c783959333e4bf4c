"""Methods from other packages: their requirements, and those that installed packages provide.

A package names its methods under the entry-point group `coprune.methods`. They are loaded once, when more than coprune's
own are needed; one that cannot be loaded is skipped with a warning.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from coprune.base.errors import BadInput
from coprune.model.walk.statistics import Statistic
from coprune.pruning.methods.base import Method
from coprune.recipe.choice import METHODS_OF_PACKAGES
from coprune.recipe.tree import LEAVES

logger = logging.getLogger(__name__)


class Brought(NamedTuple):
    """Methods of installed packages, by name."""

    methods: dict[str, Method]
    packages: dict[str, str]
    problems: dict[str, str]
    """Reasons why methods cannot be used."""


def checked_method(name: str, method: Any, taken: Collection[str]) -> Method:
    """Check that an object is a method that can be used under a name.

    Args:
        name: its name, also on the command line.
        method: an instance, or its class, which is instantiated with its defaults.
        taken: names of existing methods.

    Returns:
        The instance.

    Raises:
        BadInput: the name is taken or not usable as a folder name, or the object is not a method.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise BadInput(f"{name!r} is not a valid name for a method", fix="use letters, digits, '_', '-' and '.'")
    if name in taken:
        raise BadInput(f"there already is a method {name!r}", fix="choose another name")
    made = method() if isinstance(method, type) else method
    if (missing := missing_in(made)) is not None:
        raise BadInput(f"{name!r} is not a method: {missing}")
    own = {field.name for field in dataclasses.fields(made)}
    if shadowed := sorted(own & set(LEAVES)):
        raise BadInput(f"the method {name!r} has an option {shadowed[0]!r}, which every recipe has", fix="rename it")
    found: Method = made
    return found


def missing_in(method: Any) -> str | None:
    """Return what an object lacks to be a method, or None."""
    if not dataclasses.is_dataclass(method) or not getattr(type(method), "__dataclass_params__").frozen:  # noqa: B009
        return f"{type(method).__name__} is not a frozen dataclass"
    if not callable(getattr(method, "prune", None)):
        return f"{type(method).__name__} has no function prune(weight, statistic, target)"
    statistic = getattr(method, "statistic", "missing")
    if statistic is not None and not (isinstance(statistic, type) and issubclass(statistic, Statistic)):
        return f"{type(method).__name__}.statistic must be InputNorm, InputMoments, Gram or None, not {statistic!r}"
    return None


def names_brought() -> set[str]:
    """Return the names of methods from installed packages, without loading any."""
    return {entry.name for entry in entry_points(group=METHODS_OF_PACKAGES)}


@cache
def brought_methods(own: frozenset[str]) -> Brought:
    """Load the methods of installed packages, once.

    If two packages provide the same name, the first one wins.

    Args:
        own: names already taken.
    """
    brought = Brought({}, {}, {})
    for entry in entry_points(group=METHODS_OF_PACKAGES):
        package = entry.dist.name if entry.dist is not None else entry.module
        try:
            brought.methods[entry.name] = checked_method(entry.name, entry.load(), own | set(brought.methods))
            brought.packages[entry.name] = package
        except BadInput as error:
            brought.problems[entry.name] = f"the package {package} provides a method that is skipped: {error}"
        except Exception as error:  # a broken third-party module must not break every command
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            brought.problems[entry.name] = (
                f"the package {package} provides a method {entry.name!r} that cannot be loaded: {reason}"
            )
    return brought


@cache
def tell(problem: str) -> None:
    """Warn once about a package that does not work."""
    logger.warning(problem)
