"""Word error rates of speech models, and the agreement of two models' transcripts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from coprune.base.errors import BadInput
from coprune.base.words import per_cent
from coprune.data.speech import word_errors
from coprune.evaluation.measurement import Transcribed


class TranscriptChange(BaseModel):
    """Transcripts compared with the baseline's."""

    model_config = ConfigDict(frozen=True)

    data: str
    recordings: int
    agreement: float
    """1 − word error rate of the model's transcripts against the baseline's; at least 0."""
    same: float
    """Share of recordings with the same words in both transcripts."""
    dense: float | None
    """The baseline's word error rate; None without reference transcripts."""
    pruned: float | None
    """The model's word error rate."""

    def headline(self) -> str:
        """Return the main figure."""
        return f"{per_cent(self.agreement)} of the words alike"

    def error(self) -> str:
        """Return the model's word error rate, or its agreement without reference transcripts."""
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
    """Compare two models' transcripts. Raises BadInput if the recordings differ."""
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
