"""What a run asks of its task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from coprune.base.progress import Advance, Reporter
from coprune.data import EvaluationText, Windows
from coprune.data.images import (
    ImageSamples,
    LabelledImages,
)
from coprune.evaluation.accuracy import Accuracy
from coprune.evaluation.perplexity import Perplexity
from coprune.model.walk.activations import Activations
from coprune.pruning.pruner import Solver

if TYPE_CHECKING:
    from coprune.run.session import Session

Samples = Windows | ImageSamples
Data = EvaluationText | LabelledImages
Measured = Perplexity | Accuracy


class Task(Protocol):
    """What a run asks for; `samples.tokens` is a tensor whose first dimension counts the samples."""

    measure_name: str

    def calibration(self, solver: Solver, reporter: Reporter) -> Samples | None:
        """Draw the calibration samples; None if nothing needs them."""
        ...

    def evaluation(self, reporter: Reporter) -> dict[str, Data]:
        """Open everything that is measured on, by name; empty if nothing is asked for or known."""
        ...

    def probe(self, samples: Samples | None, data: dict[str, Data]) -> Tensor:
        """One sample to prove the replay with."""
        ...

    def batches(self, samples: Tensor) -> Sequence[Tensor]:
        """Cut calibration samples into batches on the model's device."""
        ...

    def measure(self, session: Session, data: Data, activations: Activations, advance: Advance) -> Measured:
        """Measure the model as it is now. activations: an empty list, used where the blocks are streamed."""
        ...

    def measure_in_memory(self, data: Data, advance: Advance) -> Measured:
        """Measure the loaded model, which is in memory, as it is now and in this process alone."""
        ...

    def line(self, which: str, name: str, found: Measured) -> str:
        """What was found, for people."""
        ...
