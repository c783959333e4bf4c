"""Measure candidates in parallel with the workers of sweeps: local processes, or a Ray cluster."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coprune.base.errors import CopruneError
from coprune.base.pool import Workers, run_all, workers_at
from coprune.base.progress import Reporter
from coprune.fitting.candidates import Candidate
from coprune.fitting.fit_notes import Asked, Measured
from coprune.fitting.workshop import Workshop

_RETRIES = 1
"""Retries of a candidate whose process was lost; one that loses two processes is reported."""


@dataclass(frozen=True)
class Measuring:
    """A worker's job: make and measure a candidate."""

    folder: Path
    asked: Asked
    candidate: Candidate
    wanted: tuple[tuple[str, tuple[int, ...]], ...]
    """Indices of items by task."""
    threads: int
    seconds: float = math.inf
    """Time limit."""
    gpu: bool = False
    memory: int | None = 0
    """No memory is reserved, since the user sets the number of parallel candidates."""

    @property
    def name(self) -> str:
        """Name of the candidate."""
        return self.candidate.name

    def do(self) -> Measured:
        """Make and measure the candidate."""
        wanted = {name: [*places] for name, places in self.wanted}
        return Workshop(self.folder, self.asked, Reporter(quiet=True)).measure(
            self.candidate, wanted, time.perf_counter() + self.seconds
        )


class Team:
    """Workers that share a fit's folder; local processes start when they are first needed."""

    def __init__(self, count: int, log: Path, ray: str | None = None) -> None:
        """Create a team. Raises BadInput if Ray is requested and cannot be used.

        count: number of parallel candidates. log: file for the output of libraries. ray: address of a cluster, or `local`;
        None for local processes.
        """
        self.count = count
        self._workers: Workers | None = None if count == 1 and ray is None else workers_at(ray, log)

    @property
    def alone(self) -> bool:
        """Whether candidates are measured one after another in this process."""
        return self._workers is None

    def measure(
        self,
        workshop: Workshop,
        pool: Sequence[Candidate],
        wanted: Mapping[str, Sequence[int]],
        until: float = math.inf,
    ) -> None:
        """Measure candidates. Raises CopruneError if one failed or repeatedly lost its process.

        until: deadline as for `Workshop.measure`.
        """
        assert self._workers is not None
        self._workers.at_once = self.count
        cores = self._workers.capacity
        threads = max(1, min(cores.cores_each, cores.cores // self.count))
        folder, places = workshop.folder.absolute(), tuple((name, tuple(own)) for name, own in wanted.items())
        left = until - time.perf_counter()
        jobs = [Measuring(folder, workshop.asked, candidate, places, threads, left) for candidate in pool]
        with workshop.reporter.bar(f"{len(jobs)} candidates", len(jobs)) as advance:
            for job, ended in run_all(jobs, self._workers, _RETRIES):
                advance(not ended.again)
                if isinstance(ended.reason, CopruneError):
                    raise ended.reason.within(f"{job.name} could not be measured")
                if ended.cause is not None and not ended.again:
                    raise CopruneError(f"{job.name} could not be measured: {ended.last_line}")
                if ended.cause is None:
                    workshop.learn(job.candidate, ended.value)

    def stop(self) -> None:
        """Stop all workers."""
        if self._workers is not None:
            self._workers.stop()


def places_ahead(low: int, place: int, high: int, count: int) -> list[int]:
    """List the next `count` positions of a binary search: the first, then those that may follow it."""
    found, ranges = list[int](), [(low, place, high)]
    while ranges and len(found) < count:
        (low, place, high), *ranges = ranges
        if low < high:
            found.append(place)
            ranges += [(place + 1, (place + 1 + high) // 2, high), (low, (low + place) // 2, place)]
    return found
