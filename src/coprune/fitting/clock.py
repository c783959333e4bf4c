"""The time of a process, in which every second is recorded once."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """A moment, and the seconds recorded until then."""

    moment: float
    noted: float


class Clock:
    """A clock for nested work: time that inner work has recorded does not count again for outer work."""

    def __init__(self, began: float | None = None) -> None:
        """Start the clock. began: start of the process by `time.monotonic`; now by default."""
        self._noted, self.opened = 0.0, Mark(time.monotonic() if began is None else began, 0.0)

    def mark(self) -> Mark:
        """Return a mark of the current moment."""
        return Mark(time.monotonic(), self._noted)

    def passed(self, mark: Mark) -> float:
        """Return the seconds since a mark that were not recorded otherwise."""
        return time.monotonic() - mark.moment - (self._noted - mark.noted)

    def since(self, mark: Mark) -> float:
        """Return the seconds since a mark that were not recorded otherwise, and record them."""
        took = self.passed(mark)
        self._noted += took
        return took
