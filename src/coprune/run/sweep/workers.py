"""Who does the jobs of a sweep: what local processes and a Ray cluster have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from coprune.run.sweep.events import JobEvent
from coprune.run.sweep.work import Job


@dataclass(frozen=True)
class Capacity:
    """What there is for jobs on all machines together; memory in bytes, None if unknown."""

    cores: int
    memory: int | None
    gpus: int
    cores_each: int
    """Of the largest machine, which is all that one job can have."""
    memory_each: int | None


class Workers(Protocol):
    """Do jobs, several at a time."""

    capacity: Capacity
    at_once: int
    """At most so many jobs run at a time."""

    def has_room(self, job: Job) -> bool:
        """Whether a job can start now; always so if none is running."""
        ...

    def start(self, job: Job) -> None:
        """Start a job, which there is room for."""
        ...

    def events(self, seconds: float) -> list[JobEvent]:
        """What happened; waits for something for so long."""
        ...

    def stop(self) -> None:
        """End all jobs, finished or not, and whatever did them."""
        ...
