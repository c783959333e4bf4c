"""The one way in which something with options is written as text: `name:key=value,key=value`.

`sparsegpt:block_size=64` is a method, `owl:spread=0.1,threshold=7` an allocation. Dashes in a key count as underscores.
A value is one scalar: a whole number, a number, true or false, null, or else the text itself, with or without quotes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from coprune.base.errors import BadInput

Scalar = bool | int | float | str | None
_WORDS: dict[str, Scalar] = {
    "true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None, "~": None,
}  # fmt: skip


def read_named(text: str) -> tuple[str, dict[str, Scalar]]:
    """Split `name:key=value,…` into the name and its options.

    Raises:
        BadInput: an option has no name, no value, or is given twice.
    """
    name, colon, written = text.partition(":")
    options: dict[str, Scalar] = {}
    for part in written.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key:
            raise BadInput(
                f"{text!r} lacks an option", value=text, fix=f"write {name}:OPTION=VALUE, with commas between several"
            )
        if not equals or not value:
            raise BadInput(f"the option {key!r} of {name} has no value", field=key, fix=f"write {name}:{key}=VALUE")
        key = key.replace("-", "_")
        if key in options:
            raise BadInput(f"the option {key!r} of {name} is given twice in {text!r}", field=key, fix="leave one out")
        options[key] = read_scalar(value)
    return name.strip(), options


def read_scalar(text: str) -> Scalar:
    """Read one value: a whole number, a number, true, false, null, or else the text itself."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def write_named(name: str, options: Mapping[str, Scalar]) -> str:
    """The text that `read_named` reads."""
    return f"{name}:{','.join(f'{key}={write_scalar(value)}' for key, value in options.items())}" if options else name


def write_scalar(value: Scalar) -> str:
    """A value as `read_scalar` reads it."""
    if isinstance(value, str):
        return value if read_scalar(value) == value else f"'{value}'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
