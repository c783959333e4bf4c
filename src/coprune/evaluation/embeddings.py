"""Closeness of two models' embeddings of the same passages: cosine, and agreement of search results."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict

from coprune.base.errors import BadInput
from coprune.base.words import per_cent
from coprune.evaluation.batches import bootstrap_interval
from coprune.evaluation.measurement import Embedded, Interval

NEAREST = 10
"""Number of passages that a search returns."""


class EmbeddingChange(BaseModel):
    """Closeness of embeddings to the baseline's on the same passages."""

    model_config = ConfigDict(frozen=True)

    data: str
    passages: int
    cosine: float
    """Mean cosine between both models' vectors of a passage."""
    cosine_interval: Interval | None
    nearest: int
    """Number of nearest passages that are compared."""
    overlap: float
    """Mean share of a passage's nearest neighbours that both models find."""
    overlap_interval: Interval | None

    def headline(self) -> str:
        """Return both figures."""
        return f"cosine {self.cosine:.4f}, overlap@{self.nearest} {per_cent(self.overlap)}"

    def line(self, against: str | None) -> str:
        """Return a line on the figures. against: the other model."""
        low, high = self.cosine_interval or (self.cosine, self.cosine)
        share, (least, most) = self.overlap, self.overlap_interval or (self.overlap, self.overlap)
        found = f"overlap@{self.nearest} {per_cent(share)} [{per_cent(least)}, {per_cent(most)}]"
        with_ = "" if against is None else f" with {against}"
        return f"cosine {self.cosine:.4f} [{low:.4f}, {high:.4f}], {found}{with_} on {self.data} ({self.passages} passages)"


def embedding_change(before: Embedded, after: Embedded) -> EmbeddingChange:
    """Compare two models' vectors passage by passage. Raises BadInput if the passages differ."""
    if (before.fingerprint, before.seqlen, before.passages) != (after.fingerprint, after.seqlen, after.passages):
        raise BadInput(f"the models cut {after.data} into different passages, so their vectors cannot be compared")
    first, second = before.read(), after.read()
    count = min(NEAREST, len(first) - 1)
    # Vectors of different widths have no cosine, but their neighbours can be compared.
    cosine = (first * second).sum(dim=1) if before.width == after.width else torch.zeros(len(first))
    both = (_near(first, count) & _near(second, count)).sum(dim=1) / max(count, 1)
    return EmbeddingChange(
        data=after.data,
        passages=len(first),
        cosine=float(cosine.mean()),
        cosine_interval=bootstrap_interval(cosine),
        nearest=count,
        overlap=float(both.mean()),
        overlap_interval=bootstrap_interval(both),
    )


def _near(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """Return which others are among each one's nearest: N × N bool."""
    likeness = (vectors @ vectors.T).fill_diagonal_(-torch.inf)
    return torch.zeros_like(likeness, dtype=torch.bool).scatter_(1, likeness.topk(count, dim=1).indices, True)
