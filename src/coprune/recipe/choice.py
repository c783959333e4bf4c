"""A name with options: a method, an allocation, a refinement."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator

from coprune.base.errors import BadInput
from coprune.base.validation import reason

Scalar = bool | int | float | str | None
_WORDS: dict[str, Scalar] = {
    "true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None, "~": None,
}  # fmt: skip

# The text after a comma, up to the next comma outside quotes.
_OPTION = re.compile(r""",((?:=\s*'[^']*'|=\s*"[^"]*"|[^,])*)""")


def read_named(text: str) -> tuple[str, dict[str, Scalar]]:
    """Split `name:key=value,…` into the name and its options.

    Raises:
        BadInput: an option has no name or no value, or is given twice.
    """
    name, colon, written = text.partition(":")
    options: dict[str, Scalar] = {}
    for part in _OPTION.findall(f",{written}") if colon else ():
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


def read_pairs(asked: Iterable[str], what: str, field: str) -> dict[str, str]:
    """Parse texts of comma-separated `name=value` pairs; a name alone has an empty value.

    Args:
        asked: the texts.
        what: how messages call a name, such as `the domain`.
        field: the setting that holds them.

    Raises:
        BadInput: a name is empty, or given twice.
    """
    found: dict[str, str] = {}
    for text in (part.strip() for one in asked for part in one.split(",")):
        name, _, value = (part.strip() for part in text.partition("="))
        if not name:
            raise BadInput(f"{text!r} names nothing", field=field, value=text, fix="write NAME=VALUE")
        if name in found:
            raise BadInput(f"{what} {name} is given twice", field=field, value=text, fix="leave one out")
        found[name] = value
    return found


def read_scalar(text: str) -> Scalar:
    """Parse one value as an integer, a number, true, false or null, or return the text itself."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def write_named(name: str, options: Mapping[str, Scalar]) -> str:
    """Format a name with options as `read_named` parses it."""
    return f"{name}:{','.join(f'{key}={write_scalar(value)}' for key, value in options.items())}" if options else name


def write_scalar(value: Scalar) -> str:
    """Format a value as `read_scalar` parses it."""
    if isinstance(value, str):
        plain = value and read_scalar(value) == value and not set(value) & set(",'\"") and value == value.strip()
        return value if plain else f'"{value}"' if "'" in value else f"'{value}'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# The option that marks a choice passed as a Python object.
_GIVEN = "given"


class Choice(BaseModel):
    """A name with options.

    It is read from text (`refit:rounds=10`) or a mapping (`{name: refit, rounds: 10}`), and written as a mapping.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, Scalar] = {}

    @classmethod
    def of(cls, asked: str | Mapping[str, Any] | Choice) -> Self:
        """Make a choice from text, a mapping or another choice. Raises BadInput if it is invalid."""
        try:
            return cls.model_validate(asked)
        except ValidationError as error:
            detail: Any = error.errors()[0]
            own = detail.get("ctx", {}).get("error")
            raise own if isinstance(own, BadInput) else BadInput(f"{asked!r} names nothing: {reason(detail)}") from None

    @classmethod
    def given(cls, name: str, options: Mapping[str, Scalar]) -> Self:
        """Make the choice for a Python object without a registered name."""
        return cls(name=name, options={_GIVEN: True, **options})

    @property
    def is_given(self) -> bool:
        """Whether it stands for a Python object, which is needed to repeat the run."""
        return self.options.get(_GIVEN) is True

    @property
    def is_file(self) -> bool:
        """Whether it names a file with the details."""
        return _is_file(self.name)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, asked: Any) -> Any:
        if isinstance(asked, str) and _is_file(asked):
            return {"name": asked}
        if isinstance(asked, str):
            name, options = read_named(asked)
            return {"name": name, "options": options}
        if not isinstance(asked, Mapping):
            return asked
        split = split_choice(asked)
        for key, value in split["options"].items():
            if value is not None and not isinstance(value, bool | int | float | str):
                raise ValueError(f"its option {key!r} is one value (a number, a word, true or false), not {value!r}")
        return split

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.name:
            raise ValueError("it has no name")
        return self

    @model_serializer
    def _write(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}

    def __str__(self) -> str:
        return write_named(self.name, self.options)


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def split_choice(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Split a mapping into name and options. Raises ValueError if the options are no mapping or one is given twice."""
    rest = {str(key).replace("-", "_"): value for key, value in asked.items() if key not in ("name", "options")}
    nested = asked.get("options") or {}
    if not isinstance(nested, Mapping):
        raise ValueError(f"its options are a mapping such as {{rounds: 10}}, not {nested!r}")
    if twice := sorted(set(nested) & set(rest)):
        raise ValueError(f"its option {twice[0]!r} is given twice")
    named = {"name": asked["name"]} if "name" in asked else {}
    return {**named, "options": {**nested, **rest}}


USUAL_METHOD = Choice(name="wanda")
"""The default method."""
METHOD_NAMES = (
    *("magnitude", "wanda", "wanda_variant", "sparsegpt", "ria", "dsnot", "admm", "alps"),
    *("ablate_mag_seq", "ablate_wanda_seq", "ablate_mag_iter", "ablate_wanda_iter"),
)
"""coprune's own methods, listed here so that names are checked before torch is imported."""
METHODS_OF_PACKAGES = "coprune.methods"
"""The entry point group in which installed packages register methods."""
