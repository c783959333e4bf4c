"""The time of a process, each second of which is noted once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coprune.fitting.made import note_seconds, seconds_in


@dataclass(frozen=True)
class Mark:
    """A moment, and what was noted until then."""

    moment: float
    noted: float


class Clock:
    """Tells how long things take without what was noted by itself on the way."""

    def __init__(self) -> None:
        self._opened, self._noted = time.perf_counter(), 0.0

    def mark(self) -> Mark:
        """Return this moment."""
        return Mark(time.perf_counter(), self._noted)

    def since(self, mark: Mark) -> float:
        """Return the seconds since a moment that nothing else has noted; they count as noted now."""
        took = time.perf_counter() - mark.moment - (self._noted - mark.noted)
        self._noted += took
        return took

    def rest(self) -> float:
        """Return the seconds of this process that nothing has noted; they count as noted now."""
        return self.since(Mark(self._opened, 0.0))

    @contextmanager
    def timed(self, note: Path) -> Iterator[None]:
        """Add the seconds of the body to a note."""
        mark = self.mark()
        yield
        note_seconds(note, seconds_in(note) + self.since(mark))
