"""YAML files of settings, read as if somebody had written them to mislead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from coprune.base.errors import BadInput
from coprune.base.files import like_named

_MOST_BYTES = 1_000_000
# A sweep of thousands of lines has some ten thousand; each alias counts as what it stands for.
_MOST_NODES = 100_000
_MOST_LEVELS = 200


def read_yaml(path: Path, what: str, field: str) -> Any:
    """The content of a YAML file: plain values, lists and mappings, None of an empty file.

    Args:
        path: the file.
        what: what to call it in a message (`the recipe`).
        field: the setting that named it.

    Raises:
        BadInput: it cannot be read, is no UTF-8 or no YAML, or its aliases stand for more than a file can hold.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _refused(path, what, field, f"is too large: more than {_MOST_BYTES:,} bytes")
        return _loaded(path.read_text(encoding="utf-8"))
    except OSError as error:
        near = like_named(path, least=0.75) if isinstance(error, FileNotFoundError) else None
        hint = f"did you mean {near}?" if near else "name a file that is there"
        raise _refused(path, what, field, f"cannot be read: {error.strerror or error}", hint) from None
    except UnicodeDecodeError:
        raise _refused(path, what, field, "is not UTF-8") from None
    except RecursionError:
        raise _refused(path, what, field, "is nested too deep, or holds itself") from None
    except BadInput:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter of dates and numbers that are none
        said = next(iter(str(error).splitlines()), repr(error))
        raise _refused(path, what, field, f"is not valid YAML: {said[:200]}") from None


def _refused(path: Path, what: str, field: str, why: str, fix: str | None = None) -> BadInput:
    return BadInput(f"{what} {path} {why}", field=field, value=path, fix=fix)


def _loaded(text: str) -> Any:
    """As yaml.safe_load, once it is known what the aliases come to: a few lines can stand for 10^9 values."""
    if _deepest(text) > _MOST_LEVELS:
        raise RecursionError
    root = yaml.compose(text, yaml.SafeLoader)
    if root is None:
        return None
    if _size(root, {}) > _MOST_NODES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MOST_NODES:,} values")
    return yaml.safe_load(text)


def _deepest(text: str) -> int:
    """How many brackets are open at a time. The parser takes minutes for those that it cannot follow."""
    deepest = level = 0
    for bracket in re.findall(r"[\[{\]}]|(?:[-?][ \t]+)+", text):
        if bracket[0] in "-?":  # lists in lists on one line
            deepest = max(deepest, len(bracket) // 2)
        else:
            level = max(level + (1 if bracket in "[{" else -1), 0)
            deepest = max(deepest, level)
    return deepest


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node comes to. Raises RecursionError where it holds itself."""
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
