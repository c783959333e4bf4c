"""How like the dense model's answer another one is: tokens that are the same, and the script that it is written in."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

# Letters whose names begin with how they are drawn, before they say the script.
_DRAWN = {"FULLWIDTH", "HALFWIDTH", "MODIFIER", "MATHEMATICAL", "KATAKANA-HIRAGANA"}


def agreed_share(dense: Sequence[int], answer: Sequence[int]) -> float:
    """Share of the dense model's tokens that an answer begins with: those before the first difference.

    Args:
        dense: token ids of the dense model's answer.
        answer: token ids of the other model's.

    Returns:
        Between 0 and 1; 1 where the dense model says nothing and the other one neither, 0 where only that one speaks.
    """
    if not dense:
        return 0.0 if answer else 1.0
    same = 0
    for expected, found in zip(dense, answer, strict=False):
        if expected != found:
            break
        same += 1
    return same / len(dense)


def scripts(text: str) -> Counter[str]:
    """Count a text's letters by their script, as Unicode's names of them tell it: LATIN, CYRILLIC, CJK, ARABIC …

    Args:
        text: any text; what is no letter (digits, punctuation, marks) does not count.

    Returns:
        Letters of each script.
    """
    return Counter(script for letter in text if letter.isalpha() and (script := _script(letter)) is not None)


def _script(letter: str) -> str | None:
    words = unicodedata.name(letter, "").split()
    return next((word for word in words if word not in _DRAWN), None)


def script_agreement(dense: str, answer: str) -> float | None:
    """How far two answers are written in the same scripts: what their shares of letters in each have in common.

    Args:
        dense: the dense model's answer.
        answer: the other model's.

    Returns:
        1 for the same mixture, 0 for no script in common or no letter at all; None where the dense model's has no letters,
        which tells nothing.
    """
    expected, found = scripts(dense), scripts(answer)
    if not expected:
        return None
    if not found:
        return 0.0
    all_expected, all_found = expected.total(), found.total()
    return sum(min(count / all_expected, found[script] / all_found) for script, count in expected.items())
