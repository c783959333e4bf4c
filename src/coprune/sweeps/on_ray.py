"""A Ray cluster as workers: every job is a task that asks for the cores, memory and GPU that its estimate says.

The folders of the sweep, its models and its data have to be visible to all nodes, under the same paths.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from coprune.base.environment import give_ray_its_share, keep_ray_private
from coprune.base.errors import BadInput
from coprune.sweeps.events import Cause, Doing, JobEvent, NotDone
from coprune.sweeps.worker import Capacity, Work, do_job

LOCAL = "local"
"""Address of a temporary cluster on this machine."""
_ANSWERS_WITHIN = 10.0
"""Seconds that a cluster may take to answer."""
_OBJECTS = 100 << 20  # jobs and what is told of them are all that passes through the object store


class RayWorkers:
    """Tasks of a Ray cluster.

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
        from ray.util.queue import Queue

        self._told = Queue(actor_options={"num_cpus": 0})
        self._task = ray.remote(_do)
        self._running: dict[Any, Work] = {}

    def has_room(self, job: Work) -> bool:
        if not self._running:
            return True
        known = job.memory is not None and all(other.memory is not None for other in self._running.values())
        return known and len(self._running) < self.at_once

    def start(self, job: Work) -> None:
        needed: dict[str, Any] = {"num_cpus": job.threads, "num_gpus": int(job.gpu), "memory": job.memory or None}
        # Retries are counted and reported here, whatever the cause.
        task = self._task.options(**needed, max_retries=0, name=job.name)
        self._running[task.remote(job, Path.cwd(), self._told)] = job

    def events(self, seconds: float) -> list[JobEvent]:
        ended, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        found: list[JobEvent] = self._told.get_nowait_batch(self._told.qsize())
        return [*found, *(self._ended(task) for task in ended)]

    def stop(self) -> None:
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running = {}
        self._ray.shutdown()

    def _ended(self, task: Any) -> JobEvent:
        job = self._running.pop(task)
        try:
            event: JobEvent = self._ray.get(task)
            return event
        except self._ray.exceptions.RayError as error:
            return NotDone(job.name, Cause.LOST, " ".join(str(error).split()))


def _do(job: Work, folder: Path, told: Any) -> JobEvent:
    """Run a job on a node of the cluster; intermediate events go to the queue, the last one is returned."""
    os.chdir(folder)  # paths of a recipe may be relative
    ended: list[JobEvent] = []

    def tell(event: JobEvent) -> None:
        if isinstance(event, Doing):
            told.put(event)
        else:
            ended.append(event)

    do_job(job, tell)
    return ended[-1]


def _import_ray() -> Any:
    keep_ray_private()
    try:
        import ray
    except ImportError:
        raise BadInput("a sweep on a cluster needs Ray", field="ray", fix="pip install 'coprune[ray]'") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == LOCAL:
        give_ray_its_share()  # as local processes have theirs
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
            fix="leave the address out for one of this machine alone",
        ) from None
