"""Candidates with a type for each tensor, chosen by what the types cost."""

from __future__ import annotations

import math

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.fitting.budget import Budget
from coprune.fitting.candidates import BITS, MIXED, Candidate, Cut
from coprune.fitting.making import MIXED_SAMPLES, SEQLEN
from coprune.fitting.workshop import Workshop
from coprune.gguf_files.types_by_tensor import Losses, choose

_SHARE = 0.25
"""Of the remaining budget, for measuring what types of tensors cost."""


def has_time(workshop: Workshop, budget: Budget, quant: Candidate) -> bool:
    """Return whether the budget has time to measure what types of tensors cost. quant: one that was made."""
    # Whole samples are read in less than half of the time of one token after another.
    seconds = MIXED_SAMPLES * SEQLEN / (2 * budget.reads) + workshop.making.took_to_make(quant)
    return workshop.knows_losses or seconds <= _SHARE * budget.left


def mixtures(workshop: Workshop, cut: Cut) -> list[Candidate]:
    """Return candidates of a cut with a type for each tensor, the largest first; none where losses cannot be measured."""
    try:
        losses: Losses = workshop.losses()
    except (BadInput, UnsupportedModel) as error:
        workshop.reporter.say_once(f"Every tensor gets the type that llama.cpp gives it: {error}")
        return []
    weights = sum(own["q8_0"][0] for own in losses.values()) * 32 / 34
    least = 8 * sum(min(own.values())[0] for own in losses.values()) / weights
    found = dict[tuple[tuple[str, str], ...], Candidate]()
    for bits in (*(bits for bits in BITS if bits > least), math.ceil(100 * least) / 100):
        if chosen := choose(losses, int(bits * weights / 8)):
            types = tuple(chosen.items())
            found.setdefault(types, Candidate(cut, MIXED, bits=bits, types=types))
    return [*found.values()]
