"""What pydantic finds wrong with settings and reports, as one error of coprune's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from coprune.base.errors import BadInput
from coprune.base.words import Words, parts_of

_MOST_LETTERS = 200
Kind = TypeVar("Kind", bound=BaseModel)
Place = tuple[str, ...]
"""Where a value is: the names of fields, and indices, from the outside in."""


def one_is_enough(value: Any) -> Any:
    """A validator: a single text or mapping stands for a list of one."""
    return (value,) if isinstance(value, str | Mapping) else value


def is_text(value: str) -> bool:
    """Whether UTF-8 can write something, as it cannot the name of a file that is of another encoding."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def reason(detail: Any) -> str:
    """What pydantic says of one value, as the end of a sentence."""
    said = str(detail["msg"]).removeprefix("Value error, ").removesuffix(".")
    return said.replace("Input should", "it should", 1)


def explain(error: ValidationError, names: Callable[[Place], tuple[str, str]] | None = None) -> BadInput:
    """Turn what pydantic found wrong into one BadInput.

    Args:
        error: what pydantic raised. A BadInput that a validator raised is taken over as it is.
        names: the setting that a place belongs to, and how to call the place in a message; by default the first name in
            it, and all of them with dots between.
    """
    found = [_explain(detail, names or _plain) for detail in error.errors()]
    first = found[0]
    causes = list(dict.fromkeys(parts_of(one.cause) for one in found))
    if len(causes) == 1:
        return first
    cause: Words = tuple(part for one in causes for part in ("; ", *one))[1:]
    return BadInput(cause, field=first.field, value=first.value)


def _explain(detail: Any, names: Callable[[Place], tuple[str, str]]) -> BadInput:
    inner = detail.get("ctx", {}).get("error")
    if isinstance(inner, BadInput):
        return inner
    message = reason(detail)
    place = tuple(str(part) for part in detail["loc"])
    if not place:
        return BadInput(message)
    field, name = names(place)
    if detail["type"] == "missing":
        return BadInput(f"{name} is missing", field=field)
    return BadInput(f"{name} cannot be {_short(detail['input'])}: {message}", field=field, value=detail["input"])


def _plain(place: Place) -> tuple[str, str]:
    return place[0], ".".join(place)


def _short(value: Any) -> str:
    """A value as Python writes it, cut where that is longer than a message should be."""
    written = repr(value)
    return written if len(written) <= _MOST_LETTERS else f"{written[:_MOST_LETTERS]}…"


def read_as(kind: type[Kind], path: Path) -> Kind:
    """Read a report of a kind. Raises BadInput if it is missing or no such report."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"the report {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise BadInput(f"{path} is not a report that this version of coprune can read") from None
