"""The syntax of a vocabulary cut: its size, and the texts that decide which tokens to keep."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from coprune.base.errors import BadInput
from coprune.recipe.choice import read_pairs

PART = "vocabulary"
_TEXT = "vocabulary_text"
_LARGEST = 1 << 31
_SIZE = re.compile(r"(?P<number>\d+)(?P<thousands>k?)", re.IGNORECASE)


@dataclass(frozen=True)
class Rows:
    """A number of tokens to keep."""

    count: int

    def kept(self, tokens: int) -> int:
        """Return how many tokens to keep."""
        return self.count


@dataclass(frozen=True)
class Share:
    """A share of the tokens to remove."""

    gone: float

    def kept(self, tokens: int) -> int:
        """Return how many of `tokens` to keep."""
        return round(tokens * (1 - self.gone))


@dataclass(frozen=True)
class Loss:
    """The largest allowed rise in bits per byte on held-out text, as a share."""

    most: float


Target = Rows | Share | Loss


def target_of(text: str) -> Target:
    """Parse `96k`, `98304`, `0.6` or `loss:1%`.

    Raises:
        BadInput: the text is none of these.
    """
    wrong = BadInput(
        f"{text!r} is not a size of a vocabulary",
        field="remove",
        value=f"{PART}={text}",
        fix="write a number of tokens (96k), a share to remove (0.6), or the allowed loss (loss:1%)",
    )
    if text.startswith("loss:"):
        written = text.removeprefix("loss:")
        most = _number(written.removesuffix("%"), wrong) / (100 if written.endswith("%") else 1)
        if not 0 < most < 1:
            raise wrong
        return Loss(most)
    if (found := _SIZE.fullmatch(text)) is not None:
        count = int(found["number"]) * (1024 if found["thousands"] else 1)
        if not 1 < count < _LARGEST:
            raise wrong
        return Rows(count)
    share = _number(text, wrong)
    if not 0 < share < 1:
        raise wrong
    return Share(share)


def _number(text: str, wrong: BadInput) -> float:
    try:
        return float(text)
    except ValueError:
        raise wrong from None


def shares_of(asked: Iterable[str]) -> dict[str, float]:
    """Parse names with shares, which default to 1: `("en=2,de", "code")`.

    Args:
        asked: texts of one or several names, with commas between.

    Returns:
        Shares by name, which add up to 1; empty if nothing is given.

    Raises:
        BadInput: a name is empty or given twice, or a share is not a positive number.
    """
    found: dict[str, float] = {}
    for name, written in read_pairs(asked, "the text", _TEXT).items():
        wrong = BadInput(f"the share of {name} is a positive number, not {written!r}", field=_TEXT, value=written)
        found[name] = _number(written, wrong) if written else 1.0
        if not 0 < found[name] < float("inf"):
            raise wrong
    total = sum(found.values())
    return {name: share / total for name, share in found.items()}
