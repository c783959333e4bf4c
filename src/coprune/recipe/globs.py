"""Patterns of names that speak of numbers, which the names of a smaller model do not keep."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from coprune.base.errors import BadInput
from coprune.base.words import Command, Words

# Between dots or stars, since the 1 of `fc1` and the `?` of `?_proj` are of no number; never at the end of a name.
_WHOLE = re.compile(r"(?:^|(?<=[.*]))((?:\d|\?|\[!?[^]]+\])+)(?=[.*])")
_ONE = re.compile(r"\d|\?|\[!?[^]]+\]")


def tells_numbers_apart(glob: str) -> bool:
    """Whether a pattern of names can match one block and not another of the same kind, as `model.layers.3.*` does."""
    return any(all(map(_may_be_digit, _ONE.findall(found))) for found in _WHOLE.findall(glob))


def _may_be_digit(one: str) -> bool:
    return any(fnmatchcase(digit, one) for digit in "0123456789")


def tells_experts_apart(glob: str) -> bool:
    """The same of experts, `*.experts.3.*` or `*.experts.down_proj[3]`."""
    _, named, behind = glob.rpartition("expert")
    return bool(re.search(r"\[\d+\]$", glob)) or bool(named and tells_numbers_apart(behind))


def refuse_numbers(globs: Iterable[str], field: str, removed: Collection[str]) -> BadInput | None:
    """What is wrong with patterns in a run that removes parts, and prunes or trains what is left; None if nothing is.

    Args:
        globs: the patterns.
        field: the setting that holds them.
        removed: kinds of parts that go.
    """
    blocks = bool({"blocks", "parameters"} & set(removed))
    experts = "experts" in removed
    for glob in globs:
        if (blocks and tells_numbers_apart(glob)) or (experts and tells_experts_apart(glob)):
            cause = f"{glob!r} goes by numbers, and what stays gets others before the rest of the run"
            fix: Words = (
                "remove parts in a run of its own, and name what is left as it tells: ",
                Command("inspect", "FOLDER"),
            )
            return BadInput(cause, field=field, value=glob, fix=fix)
    return None
