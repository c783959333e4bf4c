"""pydantic's validation errors as one error of coprune."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from coprune.base.errors import BadInput, unknown_name
from coprune.base.files import like_named, read_given
from coprune.base.words import Words, parts_of

_MOST_LETTERS = 200
Kind = TypeVar("Kind", bound=BaseModel)
Place = tuple[str, ...]
"""Path of a value: names of fields, and indices, from the outside in."""


def one_is_enough(value: Any) -> Any:
    """Accept a single text or mapping as a list of one; a validator."""
    return (value,) if isinstance(value, str | Mapping) else value


def path_as_text(value: Any) -> Any:
    """Accept a path as its text; a validator."""
    return str(value) if isinstance(value, Path) else value


def is_text(value: str) -> bool:
    """Return whether a string can be encoded as UTF-8; a file name in another encoding cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def reason(detail: Any) -> str:
    """Return pydantic's complaint about one value, as the end of a sentence."""
    said = str(detail["msg"]).removeprefix("Value error, ").removesuffix(".")
    return said.replace("Input should", "it should", 1)


def settings_of(kind: type[Kind], said: Mapping[str, Any]) -> Kind:
    """Make the settings of a call. Raises BadInput for an unknown name, with the nearest one, or a wrong value."""
    for name in said:
        if name not in kind.model_fields:
            raise unknown_name("setting", name, kind.model_fields, field=name)
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        raise explain(error, lambda place: (place[0], place[0])) from None


def explain(error: ValidationError, names: Callable[[Place], tuple[str, str]] | None = None) -> BadInput:
    """Convert pydantic's validation errors into one BadInput.

    Args:
        error: pydantic's error. A BadInput of a validator is kept as it is.
        names: returns the setting of a location, and the location's name in a message; by default the first name in it,
            and all of them joined by dots.
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
    """Return a value's repr, cut for messages."""
    written = repr(value)
    return written if len(written) <= _MOST_LETTERS else f"{written[:_MOST_LETTERS]}…"


def read_as(kind: type[Kind], path: Path) -> Kind:
    """Read a report of a kind. Raises BadInput if it is missing or no such report."""
    try:
        return kind.model_validate_json(read_given(path))
    except OSError as error:
        raise BadInput(f"the report {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise BadInput(f"{path} is not a report that this version of coprune can read") from None


_MOST_BYTES = 1_000_000
# A sweep of thousands of lines has some ten thousand, aliases expanded.
_MOST_NODES = 100_000
_MOST_LEVELS = 200


def read_yaml(path: Path, what: str, field: str) -> Any:
    """Return the content of a YAML file: plain values, lists and mappings; None for an empty file.

    Args:
        path: the file.
        what: its name in messages (`the recipe`).
        field: the setting that named it.

    Raises:
        BadInput: it cannot be read, is not UTF-8 or YAML, or its aliases expand to too many values.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _refused(path, what, field, f"is too large: more than {_MOST_BYTES:,} bytes")
        return _loaded(read_given(path))
    except OSError as error:
        near = like_named(path, least=0.75) if isinstance(error, FileNotFoundError) else None
        hint = f"did you mean {near}?" if near else "name a file that is there"
        raise _refused(path, what, field, f"cannot be read: {error.strerror or error}", hint) from None
    except UnicodeDecodeError:
        raise _refused(path, what, field, "is not UTF-8") from None
    except RecursionError:
        raise _refused(path, what, field, "is nested too deeply or contains itself") from None
    except BadInput:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two for invalid dates and numbers
        said = next(iter(str(error).splitlines()), repr(error))
        raise _refused(path, what, field, f"is not valid YAML: {said[:200]}") from None


def _refused(path: Path, what: str, field: str, why: str, fix: str | None = None) -> BadInput:
    return BadInput(f"{what} {path} {why}", field=field, value=path, fix=fix)


def _loaded(text: str) -> Any:
    """Parse YAML safely, refusing aliases that expand to very many values."""
    if _deepest(text) > _MOST_LEVELS:
        raise RecursionError
    root = yaml.compose(text, yaml.SafeLoader)
    if root is None:
        return None
    _refuse_doubles(root)
    if _size(root, {}) > _MOST_NODES:
        raise yaml.YAMLError(f"its aliases expand to more than {_MOST_NODES:,} values")
    return yaml.safe_load(text)


def _deepest(text: str) -> int:
    """Return the depth of open brackets, since the parser takes minutes for deep ones."""
    deepest = level = 0
    for bracket in re.findall(r"[\[{\]}]|(?:[-?][ \t]+)+", text):
        if bracket[0] in "-?":  # lists in lists on one line
            deepest = max(deepest, len(bracket) // 2)
        else:
            level = max(level + (1 if bracket in "[{" else -1), 0)
            deepest = max(deepest, level)
    return deepest


def _refuse_doubles(root: yaml.Node) -> None:
    """Raise YAMLError for a duplicate key in a mapping, whose last value would win silently."""
    left, seen = [root], set[int]()
    while left:
        node = left.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            left += node.value
            continue
        keys = set[tuple[str, str]]()
        for key, value in node.value:
            left += [key, value]
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.YAMLError(
                        f"{key.value} is given twice, the second time in line {key.start_mark.line + 1}"
                    )
                keys.add((key.tag, key.value))


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values of a node, aliases expanded. Raises RecursionError for a node that contains itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value) // 64
    if id(node) in known:
        if not known[id(node)]:
            raise RecursionError
        return known[id(node)]
    known[id(node)] = 0
    inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
    known[id(node)] = total = 1 + sum(_size(one, known) for one in inner)
    return total
