"""Measurements of the dense and of the pruned model, side by side."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from coprune.base.words import per_cent
from coprune.evaluation.measurement import Perplexity


class PerplexityFacts(BaseModel):
    """Perplexity of the dense and the pruned model on one text, with non-overlapping windows of seqlen tokens."""

    # A broken model has perplexity inf, and JSON's null could not be read back as a number.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    data: str
    source: str
    seqlen: int
    windows: int
    fingerprint: str
    dense: float | None
    pruned: float
    pruned_interval: tuple[float, float] | None
    """95 % bootstrap interval over the windows."""
    pruned_bits_per_byte: float | None
    masked: bool = False
    """Whether it is a pseudo-perplexity over masked tokens."""

    @property
    def title(self) -> str:
        """Name of the metric."""
        return "pseudo-perplexity" if self.masked else "perplexity"

    @classmethod
    def of(cls, dense: Perplexity | None, pruned: Perplexity) -> PerplexityFacts:
        """Compare two measurements on the same text. dense: None if that model was not measured."""
        return cls(
            data=pruned.data,
            source=pruned.source,
            seqlen=pruned.seqlen,
            windows=pruned.windows,
            fingerprint=pruned.fingerprint,
            dense=None if dense is None else dense.value,
            pruned=pruned.value,
            pruned_interval=pruned.interval,
            pruned_bits_per_byte=pruned.bits_per_byte,
            masked=pruned.masked,
        )

    def line(self, after: str = "") -> str:
        """Return both figures as a line. after: text to append."""
        dense = "" if self.dense is None else f"dense {self.dense:.2f} → "
        return f"{dense}pruned {self.pruned:.2f}{after} on {self.data} (sequence length {self.seqlen})"


class FinetunedFacts(BaseModel):
    """Measurements of the fine-tuned model, for a run that prunes and then trains."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    mode: str
    steps: int
    minutes: float
    perplexity: dict[str, float] = {}
    """Perplexity by text."""
    top1: dict[str, float] = {}
    """Accuracy by image set."""
    near: dict[str, str] = {}
    """Closeness of embeddings, or word error rate, by dataset."""

    def line(self) -> str:
        """Return a line on mode, steps and time."""
        return f"{self.mode}, {self.steps} steps in {self.minutes:.1f} minutes"

    def after(self, data: str) -> str:
        """Return the fine-tuned model's figure on a dataset, to append to the pruned model's; empty if there is none."""
        if data in self.perplexity:
            return f" → fine-tuned {self.perplexity[data]:.2f}"
        if data in self.near:
            return f" → fine-tuned {self.near[data]}"
        return f" → fine-tuned {per_cent(self.top1[data])} top-1" if data in self.top1 else ""


class ChangedPrediction(BaseModel):
    """An image, by position in the evaluation set, for which the dense and the pruned model predict different classes."""

    model_config = ConfigDict(frozen=True)

    image: int
    label: int
    dense: int
    pruned: int
    names: tuple[str, str, str] | None = None
    """Names of these three classes, in this order."""
    thumbnail: str | None = None
    """A small copy as a data URI, for the first examples."""


class AccuracyFacts(BaseModel):
    """Top-1 and top-5 accuracy on one set of images or labelled texts, with Wilson's 95 % intervals."""

    model_config = ConfigDict(frozen=True)

    data: str
    source: str
    images: int
    unit: str = "images"
    """Name of the counted items."""
    dense_top1: float | None
    dense_top1_interval: tuple[float, float] | None
    dense_top5: float | None
    pruned_top1: float
    pruned_top1_interval: tuple[float, float]
    pruned_top5: float
    pruned_top5_interval: tuple[float, float]
    changed: int | None
    """Number of predictions that differ from the dense model's; None if not measured."""
    examples: list[ChangedPrediction]
    """The first changed predictions."""

    def line(self, after: str = "") -> str:
        """Return both figures as a line. after: text to append."""
        before = "" if self.dense_top1 is None else f"dense {per_cent(self.dense_top1)} → "
        low, high = self.pruned_top1_interval
        top5 = f", {per_cent(self.pruned_top5)} top-5" if self.unit == "images" else ""
        top = f"pruned {per_cent(self.pruned_top1)} [{per_cent(low)}, {per_cent(high)}] top-1{top5}"
        return f"{before}{top}{after} on {self.data} ({self.images} {self.unit})"
