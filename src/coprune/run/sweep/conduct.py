"""Doing the jobs of a sweep: as many at once as there is room for; what fails is tried again, and the rest goes on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

from coprune.run.sweep.events import Cause, Doing, JobEvent, NotDone
from coprune.run.sweep.work import Job
from coprune.run.sweep.workers import Workers

_TICK = 0.25  # seconds between two looks for room that came about elsewhere

Listen = Callable[[JobEvent, bool], None]
"""Is told of every event, and whether the job will be tried again after it."""


def conduct(jobs: Sequence[Job], workers: Workers, retries: int, listen: Listen) -> None:
    """Do all jobs, the first ones first.

    retries: how often a job is tried again that was lost with its worker or met an unforeseen error. What is running
    when this is left by an exception is left to `workers.stop`.
    """
    waiting, running = deque(jobs), dict[str, Job]()
    tries: Counter[str] = Counter()
    while waiting or running:
        while (job := next((job for job in waiting if workers.has_room(job)), None)) is not None:
            waiting.remove(job)
            running[job.run.name] = job
            workers.start(job)
        for event in workers.events(_TICK):
            # What a worker told before it was lost may arrive later.
            if event.run not in running:
                continue
            again = False
            if not isinstance(event, Doing):
                job = running.pop(event.run)
                tries[event.run] += 1
                may_work = isinstance(event, NotDone) and event.cause is not Cause.REFUSED
                again = may_work and tries[event.run] <= retries
                if again:
                    waiting.appendleft(job)
            listen(event, again)
