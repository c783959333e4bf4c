"""Measurements of one model on one text or image set, as data.

Runs, sweep caches, `coprune eval` and fine-tuning all keep these; a report shows two of them side by side.
"""

from __future__ import annotations

import base64
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from coprune.base.words import per_cent

Interval = tuple[float, float]


class Measurement(BaseModel):
    """Figures of one model on one text or image set."""

    # A broken model has perplexity inf, and JSON's null could not be read back as a number.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    data: str = ""
    """Name as requested."""
    source: str = ""
    fingerprint: str = ""
    """Hash of a text's tokens, since figures per token only compare on the same ones; empty for images."""

    def on(self, name: str, source: str, fingerprint: str = "") -> Self:
        """Return the figures labelled with their data. name: as requested."""
        return self.model_copy(update={"data": name, "source": source, "fingerprint": fingerprint})


class Perplexity(Measurement):
    """A perplexity with its settings and 95 % bootstrap intervals over the windows."""

    seqlen: int
    windows: int
    tokens: int
    """Predicted tokens: windows × (seqlen − 1)."""
    value: float
    interval: Interval | None
    """None for a single window."""
    bits_per_byte: float | None
    """Bits needed per byte of text; None if the tokens' bytes are unknown."""
    per_byte: float | None
    """Perplexity per byte instead of per token: comparable between tokenizers."""
    masked: bool = False
    """Whether it is a pseudo-perplexity: each token was masked and predicted from both sides."""
    targets: bool = False
    """Whether the tokens are a decoder's targets given its encoder's inputs, and the windows are pairs."""
    window_nll: tuple[float, ...]
    """Mean negative log likelihood of every window's predicted tokens in nats, for paired comparisons."""

    def losses(self) -> Tensor:
        """Return `window_nll` as a tensor: N float64."""
        return torch.tensor(self.window_nll, dtype=torch.float64)

    def line(self) -> str:
        """Return a line on the figures."""
        low, high = self.interval or (self.value, self.value)
        per_byte = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        windows = f"({self.windows} windows, sequence length {self.seqlen})"
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]{per_byte} on {self.data} {windows}"

    @property
    def title(self) -> str:
        """The name of the figure."""
        return "pseudo-perplexity" if self.masked else "perplexity of targets" if self.targets else "perplexity"

    def of_model(self, which: str) -> str:
        """Return a sentence on the figure. which: the model, such as "dense"."""
        return f"{self.title.capitalize()} of the {which} model on {self.data} (sequence length {self.seqlen}): {self.value:.2f}"


class Accuracy(Measurement):
    """Top-1 and top-5 accuracy on images or texts, with 95 % Wilson intervals."""

    images: int
    unit: str = "images"
    """Name of the counted items."""
    top1: float
    top1_interval: Interval
    top5: float
    top5_interval: Interval
    labels: tuple[int, ...]
    """Labels of all images, in the model's numbering."""
    predicted: tuple[int, ...]
    """Predicted class of every image, for paired comparisons."""

    def line(self) -> str:
        """Return a line on the figures."""
        (low, high), (low5, high5) = self.top1_interval, self.top5_interval
        top1 = f"top-1 {per_cent(self.top1)} [{per_cent(low)}, {per_cent(high)}]"
        top5 = f", top-5 {per_cent(self.top5)} [{per_cent(low5)}, {per_cent(high5)}]" if self.unit == "images" else ""
        return f"{top1}{top5} on {self.data} ({self.images} {self.unit})"

    def of_model(self, which: str) -> str:
        """Return a sentence on the figures. which: the model, such as "dense"."""
        low, high = self.top1_interval
        top5 = f", top-5 {per_cent(self.top5)}" if self.unit == "images" else ""
        return (
            f"Accuracy of the {which} model on {self.data}: top-1 {per_cent(self.top1)} [{per_cent(low)}, {per_cent(high)}]"
            f"{top5} ({self.images} {self.unit})"
        )


class Embedded(Measurement):
    """Embeddings of passages, to compare with another model's."""

    seqlen: int
    passages: int
    width: int
    vectors: str
    """Passages × width, each of length 1, as float16 in base64."""

    @classmethod
    def of(cls, vectors: Tensor, seqlen: int) -> Embedded:
        """Store embeddings as float16. vectors: N × H."""
        raw = vectors.to(torch.float16).numpy().tobytes()
        return cls(seqlen=seqlen, passages=len(vectors), width=vectors.shape[1], vectors=base64.b64encode(raw).decode())

    def read(self) -> Tensor:
        """Return the vectors as a tensor: N × H float32, of length 1."""
        raw = np.frombuffer(base64.b64decode(self.vectors), dtype=np.float16).reshape(self.passages, self.width)
        return torch.nn.functional.normalize(torch.from_numpy(raw.astype(np.float32)), dim=-1)

    def line(self) -> str:
        """Return a line on the embedded texts."""
        return f"{self.width} values of each of {self.passages} passages of {self.seqlen} tokens on {self.data}"

    def of_model(self, which: str) -> str:
        """Return a sentence on the embeddings. which: the model, such as "dense"."""
        return f"The {which} model embedded {self.passages} passages of {self.seqlen} tokens of {self.data}"


class Closeness(Measurement):
    """Divergence from and agreement with another model, with 95 % bootstrap intervals over the windows."""

    seqlen: int
    windows: int
    positions: int
    kl: float
    """Mean KL(other ‖ this) of the next-token distributions, in nats."""
    kl_interval: Interval | None
    top1_agreement: float
    """Share of positions with the same most likely token."""
    top1_interval: Interval | None

    def line(self, against: str | None) -> str:
        """Return a line on the figures. against: the other model."""
        low, high = self.kl_interval or (self.kl, self.kl)
        kl = f"KL {self.kl:.4f} [{low:.4f}, {high:.4f}] nats"
        return f"{kl}, top-1 agreement {per_cent(self.top1_agreement)} with {against} on {self.data}"


class Transcribed(Measurement):
    """Transcripts of recordings by a model, and their word error."""

    heard: tuple[str, ...]
    """The transcript of each recording."""
    word_error: float | None
    """Word error rate; None without reference transcripts."""

    def line(self) -> str:
        """Return a line on the figures."""
        error = "" if self.word_error is None else f"word error {per_cent(self.word_error)}, "
        first = f", the first: {self.heard[0]!r:.80}" if self.heard else ""
        return f"{error}{len(self.heard)} transcripts on {self.data}{first}"

    def of_model(self, which: str) -> str:
        """Return a sentence on the transcripts. which: the model, such as "dense"."""
        return f"The {which} model hears: {self.line()}"


Measured = Perplexity | Accuracy | Embedded | Transcribed
