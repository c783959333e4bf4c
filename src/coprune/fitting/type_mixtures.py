"""Candidates with a type for each tensor, chosen by measured losses."""

from __future__ import annotations

import math

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.fitting.budget import Budget
from coprune.fitting.candidates import BITS, MIXED, Candidate, Cut
from coprune.fitting.workshop import Workshop
from coprune.gguf_files.types_by_tensor import Losses, choose

_SHARE = 0.4
"""Maximum share of the remaining budget for measuring the losses of types."""


def has_time(workshop: Workshop, budget: Budget) -> bool:
    """Return whether the budget has time to measure the losses of types."""
    return workshop.knows_losses or workshop.making.expected_losses() <= _SHARE * budget.left


def mixtures(workshop: Workshop, cut: Cut) -> list[Candidate]:
    """Return candidates of a cut with a type for each tensor, the largest first; none if losses cannot be measured."""
    try:
        losses: Losses = workshop.losses()
    except (BadInput, UnsupportedModel) as error:
        workshop.reporter.say_once(f"llama.cpp chooses the type of every tensor: {error}")
        return []
    weights = sum(own["q8_0"][0] for own in losses.values()) * 32 / 34
    least = 8 * sum(min(own.values())[0] for own in losses.values()) / weights
    found = dict[tuple[tuple[str, str], ...], Candidate]()
    for bits in (*(bits for bits in BITS if bits > least), math.ceil(100 * least) / 100):
        if chosen := choose(losses, int(bits * weights / 8)):
            types = tuple(chosen.items())
            found.setdefault(types, Candidate(cut, MIXED, bits=bits, types=types))
    return [*found.values()]
