"""What a training reads, whatever the model is for: samples to train on, samples to watch, and how they are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coprune.training.distill import Objective

if TYPE_CHECKING:
    from coprune.training.settings import FinetuneSettings


@dataclass(frozen=True)
class TrainingData:
    """The samples to train on, those held out, and where they come from.

    A sample is a dictionary of tensors: what the model takes, `labels`, and `window`, its number.
    """

    train: Any
    """A data set with a length."""
    held_out: Any | None
    source: str
    fingerprint: str
    tokens: int = 0
    """Tokens of a sample; 0 of an image."""
    batch_size: int = 1
    """Samples per forward pass, unless the settings say so."""
    accumulate: int = 8
    """Forward passes per optimiser step, unless the settings say so."""
    given: bool = False
    """Whether it is token ids that were handed over, which nothing is added to."""
    loss: Objective | None = None
    """What the samples are learned and measured by; None for the model's own loss."""


def count_held_out(settings: FinetuneSettings, samples: int, most: int) -> int:
    """How many of the samples to hold out for measurements during the training: none if there are none, never all."""
    if not settings.evaluations or not settings.held_out:
        return 0
    return max(1, min(most, samples - 1, round(settings.held_out * samples)))
