"""Repairs and limitations of a solver on one matrix, as records that `report/` puts into words."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal[
    "no tokens",  # the matrix saw none, so weights are pruned by magnitude, or channels by norm
    "only zeros",  # likewise
    "few tokens",  # figures: tokens, inputs; topped up from the layer's average
    "damping raised",  # figures: damping
    "eigenvalues clipped",
    "mask unsettled",  # figures: rounds
    "sparsity missed",  # figures: reached, asked
    "other",  # of a method from another package, with a note
]


class Event(BaseModel):
    """A repair or limitation on one matrix."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    figures: dict[str, float] = {}
    note: str = ""
    """Text from a method of another package."""
