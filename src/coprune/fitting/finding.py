"""What a search is asked for, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from coprune.fitting.candidates import TYPES, Candidate
from coprune.fitting.fit_settings import Target
from coprune.fitting.require import Condition, Held


@dataclass(frozen=True)
class Wish:
    """The user's requirements, target and time budget."""

    conditions: tuple[Condition, ...]
    target: Target = "size"
    budget: float = 3600.0
    """Seconds."""
    without: tuple[str, ...] = ()
    """Kinds of changes that are left out."""
    types: tuple[str, ...] = TYPES


@dataclass
class Finding:
    """The result of a search."""

    chosen: Candidate
    held: list[Held]
    """Conditions on the unseen half, of the best candidate."""
    kept: bool
    plain: Candidate | None
    """The smallest plain quant that passed on both halves."""
    tried: list[Candidate] = field(default_factory=list)
    unseen: dict[Candidate, list[Held]] = field(default_factory=dict)
    untried: list[Candidate] = field(default_factory=list)
    """Candidates that more time would have tried; empty if the search finished."""
    looks: int = 1
    """Number of verdicts from these unseen items, one for each sequence of candidates: with a larger budget it is another."""
