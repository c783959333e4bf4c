"""A sweep on a Ray cluster of this machine: the same numbers, also when a task's process is killed."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pytest

from coprune.base.errors import BadInput
from coprune.report.schema import Report
from coprune.sweeps.events import Cause, Doing, Done, JobEvent, NotDone
from coprune.sweeps.run import conduct
from coprune.sweeps.worker import Job
from support.pico_sweep import THREADS, alone, make_place, measured, pico_sweep

pytest.importorskip("ray")
from coprune.sweeps.on_ray import LOCAL, RayWorkers


def kill_a_task(name: str) -> bool:
    """Kill the process that does the task of this name, as Ray titles it; whether there was one."""
    for process in os.listdir("/proc"):
        try:
            with open(f"/proc/{process}/cmdline", encoding="utf-8") as file:
                title = file.read()
        except OSError:
            continue
        if title.startswith("ray::") and name in title:
            os.kill(int(process), signal.SIGKILL)
            return True
    return False


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_numbers_and_survives_a_killed_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_place(tmp_path))
    sweep, runs = pico_sweep(method=["sparsegpt"], seed=[0, 1, 2], nsamples=64)
    jobs = [Job(run, "run", sweep.folder, THREADS, memory=0) for run in runs]
    workers = RayWorkers(LOCAL)
    workers.at_once = 2
    ends, killed = [], list[bool]()

    def listen(event: JobEvent, again: bool) -> None:
        if not isinstance(event, Doing):
            ends.append((event.run, event.cause if isinstance(event, NotDone) else Done))
        elif event.text == "pruning, 1 blocks done" and not killed:
            time.sleep(0.01)
            killed.append(kill_a_task(event.run))

    try:
        conduct(jobs, workers, 1, listen)
    finally:
        workers.stop()
    found = Counter(ends)
    assert {name: found[name, Done] for name, _ in found} == {run.name: 1 for run in runs}, ends
    assert sum(count for (_, how), count in found.items() if how is Cause.LOST) == killed.count(True)
    for run in runs:
        assert measured(Report.read(run.recipe.run_folder / "report.json")) == measured(
            alone(run, tmp_path / "separate")
        )


@pytest.mark.slow
def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # not listening
        with pytest.raises(BadInput, match="no Ray cluster answers"):
            RayWorkers(f"127.0.0.1:{free.getsockname()[1]}")
