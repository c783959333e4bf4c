"""The contract of a run with its task."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from coprune.base.progress import Advance, Reporter
from coprune.data import EvaluationText, Windows
from coprune.data.images import ImageSamples, LabelledImages
from coprune.data.labelled_text import LabelledTexts
from coprune.data.speech import Recordings
from coprune.evaluation.measurement import Measured
from coprune.model.walk.activations import Activations
from coprune.model.walk.model_structure import ProvenModel

Samples = Windows | ImageSamples
Data = EvaluationText | LabelledImages | LabelledTexts | Recordings
Tokens = TypeVar("Tokens")


class Remember(Protocol):
    """Gives what was read before under the same key, or reads it now."""

    def __call__(self, key: tuple[Hashable, ...], read: Callable[[], Tokens], /) -> Tokens: ...


def read_anew(key: tuple[Hashable, ...], read: Callable[[], Tokens]) -> Tokens:
    """Read without a cache."""
    return read()


def named(found: Measured, name: str, data: Data) -> Measured:
    """Add the data to a measurement. name: as requested."""
    return found.on(name, data.source, data.fingerprint if isinstance(data, EvaluationText) else "")


class Task(Protocol):
    """The measurements and samples of a run; `samples.tokens` is a tensor whose first dimension counts the samples."""

    measure_name: str
    figures: tuple[str, ...]
    """What is measured, as requirements call it."""

    def calibration(self, needed: bool, reporter: Reporter) -> Samples | None:
        """Draw the calibration samples; None if nothing needs them.

        needed: whether all of them are, or just a few to measure layer errors on.
        """
        ...

    def evaluation(self, reporter: Reporter) -> dict[str, Data]:
        """Open everything that is measured on, by name; empty if nothing is asked for or known."""
        ...

    def probe(self, samples: Samples | None, data: dict[str, Data]) -> Tensor:
        """Return one sample for proving the replay."""
        ...

    def batches(self, samples: Tensor, marks: Tensor | None = None) -> Sequence[Tensor]:
        """Cut calibration samples into batches of one length on the model's device.

        marks: something of every token, samples × S, which is cut likewise and given instead.
        """
        ...

    def measure(self, model: ProvenModel, data: Data, activations: Activations, advance: Advance) -> Measured:
        """Measure the model as it is now, together with the other processes of the run.

        activations: an empty list, used where the blocks are streamed.
        """
        ...

    def measure_in_memory(self, data: Data, advance: Advance) -> Measured:
        """Measure the loaded model, which is in memory, as it is now and in this process alone."""
        ...
