"""What a run takes over from earlier runs on the same model and data; a run by itself takes nothing.

A sweep gives its runs a `Reuse` that remembers, so that what does not depend on how a model is pruned is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from coprune.evaluation.extras import Extras
from coprune.evaluation.measurement import Measured
from coprune.model.walk.recording import Recording
from coprune.model.walk.shown import Known
from coprune.run.estimate.found import Estimate
from coprune.run.session import Session

Tokens = TypeVar("Tokens")


class Reuse:
    """Takes nothing over: everything is done anew."""

    def tokens(self, key: tuple[Hashable, ...], read: Callable[[], Tokens]) -> Tokens:
        """Text as token ids. key: what decides them besides the model; read: tokenises the text."""
        return read()

    def estimate(self, estimate: Callable[[], Estimate | None]) -> Estimate | None:
        """What the run will take."""
        return estimate()

    def dense(
        self, session: Session, extras: Extras, measure: Callable[[], dict[str, Measured]]
    ) -> dict[str, Measured]:
        """The dense model's figures by the name of the data; also fills in what else is measured."""
        return measure()

    def gathered(
        self, session: Session, finished: Mapping[str, object], record: Callable[[], Recording | None]
    ) -> Known:
        """What is known of the blocks' inputs before the run's own walk; in `dense` propagation of all blocks or none.

        finished: blocks that an earlier run finished, of which nothing is known; record: records the calibration batches.
        """
        return {}
