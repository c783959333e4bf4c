"""Try regular expressions with the tokenizers library; run as a program with limited memory and time."""

from __future__ import annotations

import json
import resource
import sys

from tokenizers import Regex
from tokenizers.normalizers import Replace

SECONDS = 5
"""CPU limit for all patterns together."""
_BYTES = 1 << 30
_LENGTH = 64


def matches_nothing(pattern: str) -> bool:
    """Return whether a pattern can match the empty string; False for an invalid one, which the loader reports."""
    try:
        replace = Replace(Regex(pattern), "x")
    except Exception:  # the library raises plain Exception
        return False
    # Replacing an empty match by one character lengthens the text; any other match does not.
    return any(len(replace.normalize_str(text)) > len(text) for text in _texts(pattern))


def _texts(pattern: str) -> list[str]:
    """Return texts that could make a pattern backtrack: runs of its own and common characters with a different end."""
    letters = dict.fromkeys([*"a0 \n", *pattern])
    return ["a b", *(letter * _LENGTH + "\0" for letter in list(letters)[:_LENGTH])]


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    print(json.dumps([matches_nothing(pattern) for pattern in json.load(sys.stdin)]))
