"""Word errors of models that write what they hear, and how far two of them write the same."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from coprune.base.errors import BadInput
from coprune.base.words import per_cent
from coprune.data.speech import word_errors
from coprune.evaluation.measurement import Transcribed


class TranscriptChange(BaseModel):
    """Transcripts of the recordings of the baseline."""

    model_config = ConfigDict(frozen=True)

    data: str
    recordings: int
    agreement: float
    """1 less the word error of the model's transcripts against the baseline's; 0 at least."""
    same: float
    """Share of the recordings of which both write the same words."""
    dense: float | None
    """Word error of the baseline; None where nobody says what is said."""
    pruned: float | None
    """Of the model."""

    def headline(self) -> str:
        """Return the first figure."""
        return f"{per_cent(self.agreement)} of the words alike"

    def error(self) -> str:
        """Return the model's word error, or how far it agrees where nobody says what is said."""
        return self.headline() if self.pruned is None else f"word error {per_cent(self.pruned)}"

    def line(self, against: str | None) -> str:
        """Return a line on the figures. against: the other model."""
        errors = ""
        if self.dense is not None and self.pruned is not None:
            errors = f"word error {per_cent(self.dense)} → {per_cent(self.pruned)}, "
        agreed = f"{per_cent(self.agreement)} of the words alike, {per_cent(self.same)} of the transcripts"
        with_ = "" if against is None else f" with {against}"
        return f"{errors}{agreed}{with_} on {self.data} ({self.recordings} recordings)"


def transcript_change(before: Transcribed, after: Transcribed) -> TranscriptChange:
    """Compare two models' transcripts. Raises BadInput if they are of different recordings."""
    if len(before.heard) != len(after.heard):
        raise BadInput(f"{after.data} had {len(before.heard)} recordings and then {len(after.heard)}")
    errors = [word_errors(one, other) for one, other in zip(before.heard, after.heard, strict=True)]
    wrong, words = sum(error for error, _ in errors), sum(count for _, count in errors)
    return TranscriptChange(
        data=after.data,
        recordings=len(errors),
        agreement=max(0.0, 1 - wrong / max(1, words)),
        same=sum(error == 0 for error, _ in errors) / max(1, len(errors)),
        dense=before.word_error,
        pruned=after.word_error,
    )
