"""The inputs and the result of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coprune.fitting.candidates import TYPES, Candidate
from coprune.fitting.fit_notes import Measured
from coprune.fitting.fit_settings import Target
from coprune.fitting.require import Condition, Held, verdict_of


@dataclass(frozen=True)
class Wish:
    """The user's requirements, target and time budget."""

    conditions: tuple[Condition, ...]
    target: Target = "size"
    budget: float = 3600.0
    """Seconds."""
    without: tuple[str, ...] = ()
    """Kinds of changes not to try."""
    types: tuple[str, ...] = TYPES


@dataclass
class Finding:
    """The result of a search."""

    chosen: Candidate
    held: list[Held]
    """Results of the chosen candidate's conditions on the unseen half."""
    kept: bool
    plain: Candidate | None
    """The smallest plain quant that passed on both halves."""
    tried: list[Candidate] = field(default_factory=list)
    unseen: dict[Candidate, list[Held]] = field(default_factory=dict)
    untried: list[Candidate] = field(default_factory=list)
    """Candidates skipped for lack of time; empty if the search finished."""
    looks: int = 1
    """Number of sequences of candidates that these unseen items have judged; a larger budget may add another."""


def verdict_line(found: Measured, held: Sequence[Held], half: str) -> str:
    """Return a candidate's size and verdict in words. half: of the items, in a word."""
    if found.refused:
        return f"refused: {found.refused}"
    size = f"{found.bytes / 1e6:.1f} MB"
    if not held:
        return f"{size}, no cheaper than the best"
    first = min(held, key=lambda one: one.margin[1])
    return f"{size}, {verdict_of(held)} (margin {first.margin[0]:+.4f}, {first.bounds.items} {half} items)"


def best_plain(kept: Sequence[Candidate]) -> Candidate | None:
    """Return the last plain quant of some candidates."""
    return next((one for one in reversed(kept) if one.plain), None)
