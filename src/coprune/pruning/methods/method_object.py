"""A method that is handed over as an object: what a recipe says of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from coprune.base.errors import BadInput
from coprune.pruning.methods import all_methods, method_named
from coprune.pruning.methods.base import Method
from coprune.pruning.methods.entry_points import missing_in
from coprune.recipe.choice import Choice, Scalar


def choice_of(method: Method | type[Method]) -> tuple[Choice, Method]:
    """Return the choice that stands for a method object: its name where that is known, else its class.

    Args:
        method: an instance, or its class, which is then created with its defaults.

    Returns:
        A registered name with the options that differ from its defaults, by which a run can be repeated; or the qualified name
        of the class with its fields, marked as given. And the instance.

    Raises:
        BadInput: the object is not a method.
    """
    made: Any = method() if isinstance(method, type) else method
    if (missing := missing_in(made)) is not None:
        raise BadInput(f"{made!r} is not a method: {missing}", field="method", value=made)
    named = [choice for name, known in all_methods().items() if (choice := _as_named(made, name, known)) is not None]
    return min(named, key=lambda choice: len(choice.options), default=None) or _by_class(made), made


def _as_named(method: Any, name: str, known: Any) -> Choice | None:
    """Return the named choice that stands for a method, or None."""
    if type(method) is not type(known):
        return None
    differing = {field: value for field, value in _fields(method).items() if value != getattr(known, field)}
    if not all(_is_scalar(value) for value in differing.values()):
        return None
    return Choice(name=name, options=differing) if method_named(name, differing) == method else None


def _by_class(method: Any) -> Choice:
    kind = type(method)
    name = f"{kind.__module__}.{kind.__qualname__.replace('<locals>.', '')}"
    told: dict[str, Scalar] = {
        field: value if _is_scalar(value) else repr(value) for field, value in _fields(method).items()
    }
    return Choice.given(name, told)


def _fields(method: Any) -> dict[str, Any]:
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
