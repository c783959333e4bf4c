"""Parallel measurement of candidates by the workers of sweeps: local processes, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coprune.base.errors import CopruneError
from coprune.base.progress import Reporter
from coprune.fitting.candidates import Candidate
from coprune.fitting.notes import Asked
from coprune.fitting.workshop import Workshop
from coprune.sweeps.events import Doing, JobEvent, NotDone, Tell
from coprune.sweeps.on_ray import RayWorkers
from coprune.sweeps.pool import LocalWorkers
from coprune.sweeps.run import conduct
from coprune.sweeps.worker import Workers

_RETRIES = 2


@dataclass(frozen=True)
class Measuring:
    """A candidate to make and measure, as a job of a worker."""

    folder: Path
    asked: Asked
    candidate: Candidate
    wanted: tuple[tuple[str, tuple[int, ...]], ...]
    """Places of items by task."""
    threads: int
    gpu: bool = False
    memory: int | None = 0
    """Not reserved: the user sets the number of candidates at a time."""

    @property
    def name(self) -> str:
        """The candidate's."""
        return self.candidate.name

    def do(self, tell: Tell) -> Mapping[str, float]:
        """Measure it; what is found is kept in the folder."""
        tell(Doing(self.name, "measuring"))
        wanted = {name: [*places] for name, places in self.wanted}
        Workshop(self.folder, self.asked, Reporter(quiet=True)).measure(self.candidate, wanted)
        return {}


class Team:
    """Workers that share a fit's folder; processes of this machine are started when they are first needed."""

    def __init__(self, count: int, ray: str | None = None) -> None:
        """Create a team. Raises BadInput if Ray is asked for and cannot be used.

        count: candidates at a time. ray: address of a cluster, or `local`; None for processes of this machine.
        """
        self.count, self._ray = count, ray
        self._workers: Workers | None = None if ray is None else RayWorkers(ray)

    @property
    def alone(self) -> bool:
        """Whether candidates are measured one after another in this process."""
        return self.count == 1 and self._ray is None

    def measure(self, workshop: Workshop, pool: Sequence[Candidate], wanted: Mapping[str, Sequence[int]]) -> None:
        """Measure candidates. Raises CopruneError for one that was lost with its worker again and again."""
        if self._workers is None:
            self._workers = LocalWorkers(workshop.folder / "workers.log")
        self._workers.at_once = self.count
        threads = max(1, min(self._workers.capacity.cores_each, self._workers.capacity.cores // self.count))
        folder, places = workshop.folder.absolute(), tuple((name, tuple(own)) for name, own in wanted.items())
        jobs = [Measuring(folder, workshop.asked, candidate, places, threads) for candidate in pool]
        with workshop.reporter.bar(f"{len(jobs)} candidates", len(jobs)) as advance:

            def listen(event: JobEvent, again: bool) -> None:
                if isinstance(event, Doing) or again:
                    return
                advance(1)
                if isinstance(event, NotDone):
                    raise CopruneError(f"{event.run} could not be measured: {event.text.splitlines()[-1]}")

            conduct(jobs, self._workers, _RETRIES, listen)

    def stop(self) -> None:
        """Stop all workers."""
        if self._workers is not None:
            self._workers.stop()
            self._workers = None


def places_ahead(low: int, place: int, high: int, count: int) -> list[int]:
    """List the places that halving a range asks for: a place, then those that may come after it, up to a count."""
    found, ranges = list[int](), [(low, place, high)]
    while ranges and len(found) < count:
        (low, place, high), *ranges = ranges
        if low < high:
            found.append(place)
            ranges += [(place + 1, (place + 1 + high) // 2, high), (low, (low + place) // 2, place)]
    return found
