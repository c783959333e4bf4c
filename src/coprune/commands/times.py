"""Times of a command by part: those of this process, which add up to its total, and those of earlier ones apart."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from coprune.base.progress import Event
from coprune.training.training_events import TrainingPhase, TrainingPhaseDone

if TYPE_CHECKING:
    from coprune.report.schema import Report

CHOOSING = "choose weights and compare layers"
_BLOCKS = "run the blocks"
_LEAST = 0.1


class Times:
    """Seconds that this process spent on each part, as reported by events."""

    def __init__(self, began: float | None = None) -> None:
        """Start counting. began: start of the process by `time.monotonic`; now by default."""
        self._began = time.monotonic() if began is None else began
        self._parts: dict[str, float] = {}

    def started(self) -> None:
        """Count all time so far as start-up."""
        self._add("start and import libraries", time.monotonic() - self._began)

    def hear(self, event: Event) -> None:
        """Add the seconds in an event; a listener of a reporter."""
        from coprune.run.phase_events import BlockPruned, Phase, PhaseDone

        if isinstance(event, BlockPruned):
            spent = sum(matrix.seconds for matrix in event.matrices)
            self._add(_BLOCKS, -spent)  # already counted in that phase
            self._add(CHOOSING, spent)
        elif isinstance(event, PhaseDone):
            name = _BLOCKS if event.phase == Phase.PRUNE else event.measured.name
            self._add(name, event.measured.seconds)
        elif isinstance(event, TrainingPhaseDone):
            self._add(event.phase, event.seconds)

    def of(self, part: str) -> float:
        """Return the seconds of a part."""
        return self._parts.get(part, 0.0)

    def line(self, earlier: dict[str, float]) -> str:
        """Return all seconds by part as text. earlier: seconds by part of all processes, to show earlier ones' apart."""
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
    """Return the seconds in a run's report, some of which may be an earlier process's, by part."""
    found = {CHOOSING: sum(matrix.seconds for matrix in report.matrices)}
    return found if report.finetuned is None else found | {TrainingPhase.TRAIN: 60 * report.finetuned.minutes}
