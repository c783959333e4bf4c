"""Local worker processes: each does one job after another, and one that dies takes only its present job with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from coprune.base.environment import add_to_environment, see_only, usable_cores, visible_gpus, whole_environment
from coprune.base.memory import available_bytes
from coprune.sweeps.events import Cause, Doing, JobEvent, NotDone
from coprune.sweeps.worker import Capacity, Work, do_job

_GRACE = 10.0  # seconds in which a stopped worker may tidy up


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    gpu: str | None
    """The only one that it sees; None for all."""


class LocalWorkers:
    """Processes on this machine, started when they are first needed.

    log: file for what libraries print.
    """

    def __init__(self, log: Path) -> None:
        self._gpus = _gpus()
        cores, memory = usable_cores(), available_bytes()
        self.capacity = Capacity(cores, memory, len(self._gpus), cores, memory)
        self.at_once = 1
        self._log = log
        self._idle: list[_Worker] = []
        self._busy: list[tuple[_Worker, Work]] = []

    def has_room(self, job: Work) -> bool:
        if not self._busy:
            return True
        jobs = [job, *(other for _, other in self._busy)]
        if len(jobs) > self.at_once or (job.gpu and not self._free_gpus()):
            return False
        known = [one.memory for one in jobs if one.memory is not None]
        memory = self.capacity.memory
        return len(known) == len(jobs) and (memory is None or sum(known) <= memory)

    def start(self, job: Work) -> None:
        gpu = self._free_gpus()[0] if job.gpu else None
        worker = next((one for one in self._idle if one.gpu == gpu), None)
        if worker is not None:
            self._idle.remove(worker)
        if worker is None or not _sent(worker, job):
            worker = self._hire(gpu)
            worker.connection.send(job)
        self._busy.append((worker, job))

    def events(self, seconds: float) -> list[JobEvent]:
        found = []
        for connection in wait([worker.connection for worker, _ in self._busy], seconds):
            pair = next(pair for pair in self._busy if pair[0].connection is connection)
            event = self._event(*pair)
            if not isinstance(event, Doing):
                self._busy.remove(pair)
                if not (isinstance(event, NotDone) and event.cause is Cause.LOST):
                    self._idle.append(pair[0])
            found.append(event)
        return found

    def stop(self) -> None:
        workers = [*self._idle, *(worker for worker, _ in self._busy)]
        self._idle, self._busy = [], []
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_GRACE)
            worker.process.kill()
            worker.process.join()
            worker.connection.close()

    def _event(self, worker: _Worker, job: Work) -> JobEvent:
        try:
            event: JobEvent = worker.connection.recv()
            return event
        except (EOFError, OSError):
            # Once the process has ended, the locks on its files are free for the next.
            worker.process.join()
            worker.connection.close()
            return NotDone(job.name, Cause.LOST, _how_it_ended(worker.process.exitcode))

    def _free_gpus(self) -> list[str]:
        taken = {worker.gpu for worker, _ in self._busy}
        return [gpu for gpu in self._gpus if gpu not in taken]

    def _hire(self, gpu: str | None) -> _Worker:
        # What takes seconds to import is imported by one process, from which every worker is forked.
        context: Any = get_context("forkserver" if sys.platform == "linux" else "spawn")
        context.set_forkserver_preload(["coprune.runner.run_recipe"])
        ours, theirs = context.Pipe()
        given = (theirs, gpu, self._log, whole_environment())
        process = context.Process(target=_work, args=given, name="coprune-sweep", daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        return _Worker(process, ours, gpu)


def _sent(worker: _Worker, job: Work) -> bool:
    """Return whether an idle worker accepted a job; a killed one does not."""
    if not worker.process.is_alive():
        return False
    with suppress(OSError):
        worker.connection.send(job)
        return True
    return False


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (which the system sends when memory runs out)" if name == "SIGKILL" else ""
        return f"the process that did it was ended by {name}{hint}"
    return f"the process that did it ended with exit code {code}"


def _gpus() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    from coprune.base.devices import accelerators

    count, named = accelerators(), visible_gpus()
    return named[:count] if named else [str(number) for number in range(count)]


def _work(connection: Connection, gpu: str | None, log: Path, environment: dict[str, str]) -> None:
    """Run jobs in a worker process until it is stopped or its parent is gone."""
    # Ctrl-C reaches every process of a terminal, but the parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    add_to_environment(environment)
    if gpu is not None:
        see_only(gpu)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    with suppress(KeyboardInterrupt, EOFError):
        while True:
            do_job(connection.recv(), connection.send)


def _stop(number: int, frame: object) -> None:
    """Stop as Ctrl-C stops a command, so that temporary files are removed; once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
