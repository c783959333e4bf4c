"""Options of methods and refinements: the fields of a frozen dataclass, checked by name, type and range."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from coprune.base.errors import BadInput, unknown_name
from coprune.base.validation import reason

Configurable = TypeVar("Configurable")


def one_of(
    table: Mapping[str, Configurable], kind: str, name: str, options: Mapping[str, object], field: str | None = None
) -> Configurable:
    """Find an entry of a table by name and set its options.

    field: the recipe's setting, if not named like the kind. Raises BadInput for an unknown name, and as `with_options`.
    """
    if name not in table:
        raise unknown_name(kind, name, table, field=field or kind)
    return with_options(table[name], kind, name, options)


def with_options(default: Configurable, kind: str, name: str, options: Mapping[str, object]) -> Configurable:
    """Copy a dataclass instance with some of its fields changed.

    kind and name are for messages ("method", "sparsegpt"). Raises BadInput for an unknown option, a value of
    another type, or one that the class's own check refuses.
    """
    fields = {field.name for field in dataclasses.fields(default)}  # type: ignore[arg-type]
    hints = get_type_hints(type(default))
    for option, value in options.items():
        if not fields:
            raise BadInput(f"{kind} {name!r} has no options, so {option!r} cannot be set", field=option, value=value)
        if option not in fields:
            raise unknown_name(f"option of {kind} {name!r}:", option, fields, field=option)
        try:
            TypeAdapter(hints[option]).validate_python(value, strict=True)
        except ValidationError as error:
            said = f"option {option!r} of {kind} {name!r} cannot be {value!r}: {reason(error.errors()[0])}"
            raise BadInput(said, field=option, value=value) from None
    changed: dict[str, Any] = dict(options)
    return dataclasses.replace(default, **changed)  # type: ignore[type-var]


def require_positive(**values: float) -> None:
    """Raise BadInput unless every value is a positive, finite number."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise BadInput(f"option {name!r} must be a positive number, not {value!r}", field=name, value=value)


def require_not_negative(**values: float) -> None:
    """Raise BadInput unless every value is zero or a positive, finite number."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise BadInput(f"option {name!r} must not be negative, but is {value!r}", field=name, value=value)
