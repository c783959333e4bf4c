"""The syntax of a vocabulary cut: its size, and the texts that decide which tokens stay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from coprune.base.errors import BadInput
from coprune.recipe.choice import read_pairs

PART = "vocabulary"
_LARGEST = 1 << 31
_SIZE = re.compile(r"(?P<number>\d+)(?P<thousands>k?)", re.IGNORECASE)


@dataclass(frozen=True)
class Rows:
    """Keep a number of tokens."""

    count: int

    def kept(self, tokens: int) -> int:
        """Return how many of so many tokens stay."""
        return self.count


@dataclass(frozen=True)
class Share:
    """Remove a share of the tokens."""

    gone: float

    def kept(self, tokens: int) -> int:
        """Return how many of so many tokens stay."""
        return round(tokens * (1 - self.gone))


@dataclass(frozen=True)
class Loss:
    """Keep as few tokens as cost at most a share more bits per byte on held-out text."""

    most: float


Target = Rows | Share | Loss


def target_of(text: str) -> Target:
    """Read `96k`, `98304`, `0.6` or `loss:1%`.

    Raises:
        BadInput: it is none of these.
    """
    wrong = BadInput(
        f"{text!r} is not a size of a vocabulary",
        field="remove",
        value=f"{PART}={text}",
        fix="write a number of tokens (96k), a share to remove (0.6), or the loss that is allowed (loss:1%)",
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


def shares_of(asked: Iterable[str], field: str) -> dict[str, float]:
    """Read names with shares, each 1 unless said otherwise: `("en=2,de", "code")`.

    Args:
        asked: texts of one or several names, with commas between.
        field: the setting that they are of.

    Returns:
        Shares that add up to 1, by name; none where nothing is asked for.

    Raises:
        BadInput: a name is empty or given twice, or a share is no positive number.
    """
    found: dict[str, float] = {}
    for name, written in read_pairs(asked, "the text", field).items():
        wrong = BadInput(f"the share of {name} is a positive number, not {written!r}", field=field, value=written)
        found[name] = _number(written, wrong) if written else 1.0
        if not 0 < found[name] < float("inf"):
            raise wrong
    total = sum(found.values())
    return {name: share / total for name, share in found.items()}
