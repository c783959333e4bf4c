"""Parallel jobs, in processes of this machine or as tasks of a Ray cluster; retried if a process is lost.

With Ray, the folders of the jobs, their models and their data must be visible to all nodes under the same paths.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from coprune.base.environment import (
    keep_ray_at_our_priority,
    keep_ray_private,
    quieten_libraries,
    see_only,
    usable_cores,
    visible_gpus,
)
from coprune.base.errors import BadInput, CopruneError
from coprune.base.memory import available_bytes, forget_peak, return_free_memory

LOCAL = "local"
"""Address of a temporary Ray cluster on this machine."""
_GRACE = 10.0
"""Seconds in which a stopped worker may remove its temporary files."""
_ANSWERS_WITHIN = 10.0
"""Seconds that a cluster may take to answer."""
_OBJECTS = 100 << 20  # Ray's object store only holds jobs and their results


class Job(Protocol):
    """Work that can be sent to another process."""

    @property
    def name(self) -> str:
        """Unique among the jobs of a call."""
        ...

    @property
    def threads(self) -> int:
        """Number of cores needed."""
        ...

    @property
    def gpu(self) -> bool:
        """Whether it needs a GPU."""
        ...

    @property
    def memory(self) -> int | None:
        """Bytes needed; None if unknown, in which case the job runs alone."""
        ...

    def do(self) -> Any:
        """Do the job and return a picklable result."""
        ...


AnyJob = TypeVar("AnyJob", bound=Job)


class Cause(StrEnum):
    """The reason why a job failed."""

    REFUSED = "refused"
    """It would fail again the same way."""
    BROKEN = "broken"
    """An unforeseen error."""
    LOST = "lost"
    """Its process is gone."""


@dataclass(frozen=True)
class Outcome:
    """The result of one try of a job."""

    value: Any = None
    seconds: float = 0.0
    cause: Cause | None = None
    """None for success."""
    reason: str | CopruneError = ""
    again: bool = False
    """Whether the job will be tried again."""

    @property
    def text(self) -> str:
        """Reason in words."""
        return str(self.reason).strip()

    @property
    def last_line(self) -> str:
        """Reason in one line: of a traceback, the error itself."""
        return (self.text.splitlines() or [""])[-1]


@dataclass(frozen=True)
class Capacity:
    """Resources for jobs on all machines together; memory in bytes, None if unknown."""

    cores: int
    memory: int | None
    gpus: int
    cores_each: int
    """Cores of the largest machine, the maximum for one job."""
    memory_each: int | None


class Workers(Protocol):
    """The executor of jobs."""

    capacity: Capacity
    at_once: int
    """Maximum number of jobs at a time."""

    def has_room(self, job: Job, running: Collection[Job]) -> bool:
        """Return whether a job can run beside the running ones, of which there is at least one."""
        ...

    def submit(self, job: Job) -> Future[Outcome]:
        """Start a job."""
        ...

    def outcome(self, future: Future[Outcome]) -> Outcome:
        """Return the outcome of a job whose future is done."""
        ...

    def stop(self) -> None:
        """End all jobs and processes."""
        ...


def workers_at(ray: str | None, log: Path) -> Workers:
    """Return a Ray cluster, or processes of this machine. Raises BadInput if no cluster answers.

    Args:
        ray: address as `ray.init` takes it, or `local` for a temporary cluster; None for processes.
        log: file for the output of libraries in processes.
    """
    return LocalWorkers(log) if ray is None else RayWorkers(ray)


def run_all(jobs: Sequence[AnyJob], workers: Workers, retries: int) -> Iterator[tuple[AnyJob, Outcome]]:
    """Run all jobs in order, and yield them as they end.

    After an exception, also in the consumer, running jobs are left to `workers.stop`.

    Args:
        jobs: the jobs, with distinct names.
        workers: the workers that execute them.
        retries: number of retries after a lost process or an unforeseen error.

    Yields:
        Each job with its outcome; again later if `Outcome.again`.
    """
    waiting, running, tries = deque(jobs), dict[Future[Outcome], AnyJob](), Counter[str]()
    while waiting or running:
        while (job := next((one for one in waiting if _fits(one, workers, running.values())), None)) is not None:
            waiting.remove(job)
            running[workers.submit(job)] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, ended = running.pop(future), workers.outcome(future)
            tries[job.name] += 1
            if ended.cause in (Cause.BROKEN, Cause.LOST) and tries[job.name] <= retries:
                waiting.appendleft(job)
                ended = replace(ended, again=True)
            yield job, ended


def _fits(job: Job, workers: Workers, running: Collection[Job]) -> bool:
    if not running:
        return True
    known = all(one.memory is not None for one in (job, *running))
    return known and len(running) < workers.at_once and workers.has_room(job, running)


def do_job(job: Job) -> Outcome:
    """Do a job in this process; only an interruption is raised."""
    import torch

    quieten_libraries()
    torch.set_num_threads(job.threads)
    forget_peak()
    started = time.perf_counter()
    try:
        return Outcome(job.do(), time.perf_counter() - started)
    except CopruneError as error:
        return Outcome(cause=Cause.REFUSED, reason=error)
    except Exception:
        return Outcome(cause=Cause.BROKEN, reason=traceback.format_exc())
    finally:
        gc.collect()
        return_free_memory()


@dataclass
class _Slot:
    """A process for one job at a time, with its own executor, so that losing it affects no other job."""

    executor: ProcessPoolExecutor
    stopping: Connection
    gpu: str | None
    """The only visible GPU; None for all."""
    future: Future[Outcome] | None = None

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do."""
        return self.future is None or self.future.done()

    def close(self) -> None:
        """Wait for the end of its process."""
        self.executor.shutdown(cancel_futures=True)
        self.stopping.close()


class LocalWorkers:
    """Processes on this machine, started when they are first needed.

    log: file for what libraries print.
    """

    def __init__(self, log: Path) -> None:
        self._gpus = _gpus()
        cores, memory = usable_cores(), available_bytes()
        self.capacity = Capacity(cores, memory, len(self._gpus), cores, memory)
        self.at_once = 1
        self._log, self._slots = log, list[_Slot]()

    def has_room(self, job: Job, running: Collection[Job]) -> bool:
        jobs = (job, *running)
        there = self.capacity.memory
        enough = there is None or sum(one.memory or 0 for one in jobs) <= there
        return enough and (not job.gpu or sum(one.gpu for one in jobs) <= len(self._gpus))

    def submit(self, job: Job) -> Future[Outcome]:
        for slot in [one for one in self._slots if one.idle and (one.gpu is not None) == job.gpu]:
            with suppress(BrokenProcessPool):  # it was killed while it was idle
                slot.future = slot.executor.submit(do_job, job)
                return slot.future
            self._end(slot)
        slot = self._slot(job.gpu)
        # Ctrl-C reaches every process of a terminal, but only this one handles it: processes started now inherit the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            slot.future = slot.executor.submit(do_job, job)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return slot.future

    def outcome(self, future: Future[Outcome]) -> Outcome:
        error = future.exception()
        if error is None:
            return future.result()
        if not isinstance(error, BrokenProcessPool | KeyboardInterrupt):  # an error that cannot be pickled
            return Outcome(cause=Cause.BROKEN, reason=f"{type(error).__name__}: {error}")
        for slot in [one for one in self._slots if one.future is future]:
            self._end(slot)  # once its process has ended, the locks on its files are free for the next
        hint = "by a signal, as the system does when memory runs out"
        return Outcome(cause=Cause.LOST, reason=f"its process was killed ({hint})")

    def stop(self) -> None:
        slots, self._slots = self._slots, []
        for slot in slots:
            if not slot.idle:
                with suppress(OSError):  # it may have ended already
                    slot.stopping.send(None)
        for slot in slots:
            slot.close()

    def _end(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        slot.close()

    def _slot(self, gpu: bool) -> _Slot:
        taken = {slot.gpu for slot in self._slots}
        own = next(one for one in self._gpus if one not in taken) if gpu else None
        context = get_context("spawn")
        told, stopping = context.Pipe(duplex=False)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        slot = _Slot(ProcessPoolExecutor(1, context, _begin, (told, own, self._log)), stopping, own)
        self._slots.append(slot)
        return slot


def _gpus() -> list[str]:
    """Return the GPUs visible to this process, as in CUDA_VISIBLE_DEVICES."""
    from coprune.base.devices import accelerators

    count, named = accelerators(), visible_gpus()
    return named[:count] if named else [str(number) for number in range(count)]


def _begin(told: Connection, gpu: str | None, log: Path) -> None:
    """Prepare a worker process, which ends with its parent."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_when, args=(told,), daemon=True).start()
    if gpu is not None:
        see_only(gpu)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def _interrupt(number: int, frame: object) -> None:
    """Stop as Ctrl-C stops a command, so that temporary files are removed; once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_when(told: Connection) -> None:
    """End this process when its parent is gone, or some seconds after that says so."""
    with suppress(EOFError, OSError):
        told.recv()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)
    os._exit(1)


class RayWorkers:
    """Tasks of a Ray cluster, each requesting the cores, memory and GPU of its job.

    address: as `ray.init` takes it, or `local`. Raises BadInput if Ray is not installed or no cluster answers.
    """

    def __init__(self, address: str) -> None:
        self._ray = ray = _import_ray()
        _connect(ray, address)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores, memory, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "memory", "GPU"))
        self.capacity = Capacity(sum(cores), sum(memory), sum(gpus), max(cores), max(memory))
        self.at_once = 1
        if self.capacity.cores < 1:
            ray.shutdown()
            raise BadInput(
                "no node of the Ray cluster offers a core", field="ray", fix="start its nodes with --num-cpus"
            )
        self._task, self._running = ray.remote(_do_in), dict[Future[Outcome], Any]()

    def has_room(self, job: Job, running: Collection[Job]) -> bool:
        return True  # Ray decides by the tasks' requests

    def submit(self, job: Job) -> Future[Outcome]:
        needed: dict[str, Any] = {"num_cpus": job.threads, "num_gpus": int(job.gpu), "memory": job.memory or None}
        # Retries are counted and reported by `run_all`, whatever the cause.
        task = self._task.options(**needed, max_retries=0, name=job.name).remote(job, Path.cwd())
        future: Future[Outcome] = task.future()
        self._running[future] = task
        return future

    def outcome(self, future: Future[Outcome]) -> Outcome:
        del self._running[future]
        try:
            return future.result()
        except self._ray.exceptions.RayError as error:
            return Outcome(cause=Cause.LOST, reason=" ".join(str(error).split()))

    def stop(self) -> None:
        for task in self._running.values():
            self._ray.cancel(task, force=True)
        self._running = {}
        self._ray.shutdown()


def _do_in(job: Job, folder: Path) -> Outcome:
    """Do a job on a node of the cluster. folder: base of the job's relative paths."""
    os.chdir(folder)
    return do_job(job)


def _import_ray() -> Any:
    keep_ray_private()
    try:
        import ray
    except ImportError:
        raise BadInput("work on a cluster needs Ray", field="ray", fix="pip install 'coprune[ray]'") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == LOCAL:
        keep_ray_at_our_priority()  # the same priority as local processes
        ray.init("local", include_dashboard=False, object_store_memory=_OBJECTS, **quiet)
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), _ANSWERS_WITHIN).close()
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]})",
            field="ray",
            value=address,
            fix="leave out the address to use this machine alone",
        ) from None
