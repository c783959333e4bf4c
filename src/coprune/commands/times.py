"""Where the seconds of a command went: those of this process, which add up to all of them, and those of earlier ones apart."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from coprune.base.progress import Event

if TYPE_CHECKING:
    from coprune.report.schema import Report

CHOOSING, TRAINING = "choose weights and compare layers", "train"
_BLOCKS = "run the blocks"
_LEAST = 0.1


class Times:
    """Seconds of the parts of this process's work, as its events report them."""

    def __init__(self, began: float | None = None) -> None:
        """Begin. began: when the process did, by `time.monotonic`; by default now."""
        self._began = time.monotonic() if began is None else began
        self._parts: dict[str, float] = {}

    def started(self) -> None:
        """Take all that was up to now for the start."""
        self._add("start and import libraries", time.monotonic() - self._began)

    def hear(self, event: Event) -> None:
        """Take the seconds in an event: a listener of a reporter."""
        from coprune.run.events import BlockPruned, Phase, PhaseDone
        from coprune.training.events import Trained

        if isinstance(event, BlockPruned):
            spent = sum(matrix.seconds for matrix in event.matrices)
            self._add(_BLOCKS, -spent)  # it is a part of that phase
            self._add(CHOOSING, spent)
        elif isinstance(event, PhaseDone):
            name = _BLOCKS if event.phase == Phase.PRUNE else event.measured.name
            self._add(name, event.measured.seconds)
        elif isinstance(event, Trained):
            self._add(TRAINING, event.seconds)

    def of(self, part: str) -> float:
        """Return the seconds of a part."""
        return self._parts.get(part, 0.0)

    def line(self, earlier: dict[str, float]) -> str:
        """Return all seconds by part. earlier: those of a part that belong to any process, so that others' are told apart."""
        total = time.monotonic() - self._began
        shown = {what: round(seconds, 1) for what, seconds in self._parts.items() if seconds >= _LEAST}
        told = [f"{seconds:.1f} s to {what}" for what, seconds in shown.items()]
        rest = round(total - sum(shown.values()), 1)
        told += [f"{rest:.1f} s for the rest"] if rest >= _LEAST else []
        before = {what: seconds - self.of(what) for what, seconds in earlier.items()}
        apart = [f"{seconds:.1f} s to {what}" for what, seconds in before.items() if seconds >= _LEAST]
        return f"{total:.1f} s: {', '.join(told)}" + (
            f"; before, until it was stopped: {', '.join(apart)}" if apart else ""
        )

    def _add(self, what: str, seconds: float) -> None:
        self._parts[what] = self.of(what) + seconds


def of_any_process(report: Report) -> dict[str, float]:
    """Return the seconds in a run's report that may be an earlier process's, by part."""
    found = {CHOOSING: sum(matrix.seconds for matrix in report.matrices)}
    return found if report.finetuned is None else found | {TRAINING: 60 * report.finetuned.minutes}
