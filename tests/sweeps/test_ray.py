"""A sweep on a local Ray cluster gives the same numbers, even if a task's process is killed."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from threading import Thread

import pytest

from coprune.base.errors import BadInput
from coprune.base.pool import LOCAL, Cause, RayWorkers, run_all
from coprune.report.schema import Report
from coprune.sweeps.job import RunJob
from support.pico_sweep import THREADS, alone, make_place, measured, pico_sweep

pytest.importorskip("ray")


def kill_a_task(name: str) -> bool:
    """Kill the process of the task with this name, as titled by Ray; return whether there was one."""
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
    jobs = [RunJob(run, "run", sweep.folder, THREADS, memory=0) for run in runs]
    workers = RayWorkers(LOCAL)
    workers.at_once = 2

    def kill() -> None:
        while not kill_a_task(runs[0].name):
            time.sleep(0.1)

    killing = Thread(target=kill)
    killing.start()
    try:
        ended = [(job.name, outcome.cause) for job, outcome in run_all(jobs, workers, 1)]
    finally:
        workers.stop()
        killing.join()
    assert Counter(ended) == {(run.name, None): 1 for run in runs} | {(runs[0].name, Cause.LOST): 1}
    for run in runs:
        assert measured(Report.read(run.recipe.run_folder / "report.json")) == measured(
            alone(run, tmp_path / "separate")
        )


@pytest.mark.slow
def test_an_address_without_a_cluster_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # not listening
        with pytest.raises(BadInput, match="no Ray cluster answers"):
            RayWorkers(f"127.0.0.1:{free.getsockname()[1]}")
