"""The time of a process, each second of which is noted once."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """A moment, and what was noted until then."""

    moment: float
    noted: float


class Clock:
    """Tells how long things take without what was noted by itself on the way."""

    def __init__(self) -> None:
        self._noted, self.opened = 0.0, Mark(time.perf_counter(), 0.0)

    def mark(self) -> Mark:
        """Return this moment."""
        return Mark(time.perf_counter(), self._noted)

    def passed(self, mark: Mark) -> float:
        """Return the seconds since a moment that nothing else has noted."""
        return time.perf_counter() - mark.moment - (self._noted - mark.noted)

    def since(self, mark: Mark) -> float:
        """Return the same; they count as noted now."""
        took = self.passed(mark)
        self._noted += took
        return took
