"""Regular expressions from foreign files: compiled and searched in a child process with limits on time and memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from coprune.base.limited import Child, Exceeded, render_limited

_LONGEST = 2_000
"""Maximum characters of a pattern."""
_SECONDS = 0.5
"""Maximum seconds of a search; ordinary ones take microseconds."""
_CHILDREN: dict[str, Child] = {}


def require_pattern(pattern: object) -> None:
    """Raise ValueError if a value is not a regular expression, or takes too long to compile."""
    if not isinstance(pattern, str):
        raise ValueError("it is not text")
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has {len(pattern):,} characters, more than {_LONGEST:,}")
    _in_child(pattern, "")


def is_found(pattern: str, text: str) -> bool:
    """Return whether a pattern is found in a text; False if the search exceeds half a second or a gigabyte.

    Raises ValueError for an invalid regular expression.
    """
    try:
        return _in_child(pattern, text) == "yes"
    except Exceeded:
        return False


def _in_child(pattern: str, text: str) -> str:
    return render_limited(_CHILDREN, "patterns", _search, (pattern, text))


def _search(pattern: str, text: str) -> str:
    """Search in the child process; return the answer as text."""
    try:
        return "yes" if _compiled(pattern).search(text, timeout=_SECONDS) else "no"
    except TimeoutError:
        return "no"
    except RecursionError:
        raise ValueError("it is nested too deep") from None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    import regex

    return regex.compile(pattern)
