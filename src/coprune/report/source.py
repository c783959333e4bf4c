"""What a report calls the model that was pruned, by where it came from."""

from __future__ import annotations

import re

# The file that a package carries a model of the Hub in, as `locate` writes it; folders may hold spaces and parentheses.
_CARRIED = re.compile(r" \([^()/]+\.gguf\)$")


def base_of(source: str) -> str:
    """A source without the file that a package carries it in: a path, or a name of the Hub."""
    return _CARRIED.sub("", source)


def name_of(source: str) -> str:
    """The last part of that."""
    return base_of(source).rstrip("/").rpartition("/")[2]
