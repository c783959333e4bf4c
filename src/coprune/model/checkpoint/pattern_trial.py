"""A trial of regular expressions by the tokenizers library; run as a program, with limits on memory and time."""

from __future__ import annotations

import json
import resource
import sys

from tokenizers import Regex
from tokenizers.normalizers import Replace

SECONDS = 5
"""Of CPU, for all patterns."""
_BYTES = 1 << 30
_LENGTH = 64


def matches_nothing(pattern: str) -> bool:
    """Return whether a pattern can match the empty string. One that the library refuses, which its loader reports, cannot."""
    try:
        replace = Replace(Regex(pattern), "x")
    except Exception:  # the library's own, of no other type
        return False
    # A match that is not empty takes a character for the one that is put there.
    return any(len(replace.normalize_str(text)) > len(text) for text in _texts(pattern))


def _texts(pattern: str) -> list[str]:
    """Return texts that a pattern could get lost in: runs of its own letters and of usual ones that end otherwise."""
    letters = dict.fromkeys([*"a0 \n", *pattern])
    return ["a b", *(letter * _LENGTH + "\0" for letter in list(letters)[:_LENGTH])]


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    print(json.dumps([matches_nothing(pattern) for pattern in json.load(sys.stdin)]))
