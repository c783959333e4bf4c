"""The pool of worker processes: a kill only affects the worker's own job, and errors arrive as raised."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.base.pool import Cause, LocalWorkers, Outcome, run_all
from support.jobs import Doing


@pytest.fixture
def workers(forked_workers: None, tmp_path: Path) -> Iterator[LocalWorkers]:
    found = LocalWorkers(tmp_path / "logs" / "workers.log")
    found.at_once = 2
    yield found
    found.stop()


def done(names: list[str], workers: LocalWorkers, folder: Path, retries: int = 1) -> list[tuple[str, Outcome]]:
    return [(job.name, ended) for job, ended in run_all([Doing(name, folder) for name in names], workers, retries)]


def is_running(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_job_of_a_killed_process_is_retried_and_others_are_unaffected(
    workers: LocalWorkers, tmp_path: Path
) -> None:
    ended = done(["dies once", "works"], workers, tmp_path)
    (lost,) = (one for name, one in ended if one.again)
    assert lost.cause is Cause.LOST
    assert "memory runs out" in lost.text
    assert {name: one.value for name, one in ended if not one.again} == {"dies once": None, "works": "done"}
    assert [len(Doing(name, tmp_path).tries()) for name in ("dies once", "works")] == [2, 1]


def test_a_terminated_worker_does_not_end_the_others(workers: LocalWorkers, tmp_path: Path) -> None:
    job = Doing("writes", tmp_path)

    def end() -> None:
        wait_for((tmp_path / "half").exists)
        os.kill(job.tries()[0], signal.SIGTERM)

    ending = threading.Thread(target=end)
    ending.start()
    ended = [(one.name, outcome.cause) for one, outcome in run_all([job, Doing("works", tmp_path)], workers, 0)]
    ending.join()
    assert sorted(ended) == [("works", None), ("writes", Cause.LOST)]


def test_a_job_that_kills_its_worker_twice_is_reported(workers: LocalWorkers, tmp_path: Path) -> None:
    ended = done(["dies"], workers, tmp_path)
    assert [(one.cause, one.again) for _, one in ended] == [(Cause.LOST, True), (Cause.LOST, False)]
    assert len(Doing("dies", tmp_path).tries()) == 2


def test_errors_arrive_with_cause_and_fix_and_only_unforeseen_ones_are_retried(
    workers: LocalWorkers, tmp_path: Path
) -> None:
    ended = done(["refuses", "breaks", "returns"], workers, tmp_path)
    (refused,) = (one for name, one in ended if name == "refuses")
    error = refused.reason
    assert isinstance(error, BadInput)
    assert (error.field, error.value, str(error)) == ("nsamples", 0, "nothing is left; take more with nsamples=…")
    assert [(one.cause, one.again) for name, one in ended if name == "breaks"] == [
        (Cause.BROKEN, True),
        (Cause.BROKEN, False),
    ]
    assert {one.last_line for name, one in ended if name == "breaks"} == {"RuntimeError: out of luck"}
    assert all("Traceback" not in one.last_line for _, one in ended)
    assert {one.cause for name, one in ended if name == "returns"} == {Cause.BROKEN}


def test_a_stopped_job_leaves_no_half_file(workers: LocalWorkers, tmp_path: Path) -> None:
    jobs = [Doing("writes", tmp_path)]

    def stop() -> None:
        wait_for((tmp_path / "half").exists)
        workers.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    assert [one.cause for _, one in run_all(jobs, workers, 0)] == [Cause.LOST]
    stopping.join()
    assert {path.name for path in tmp_path.iterdir()} == {"half", "logs", "writes.tries"}
    assert not is_running(jobs[0].tries()[0])


_PARENT = """
from pathlib import Path
from coprune.base.pool import LocalWorkers, run_all
from support.jobs import Doing
if __name__ == "__main__":
    list(run_all([Doing("writes", Path("."))], LocalWorkers(Path("log")), 0))
"""


def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(_PARENT)
    paths = os.pathsep.join(sys.path)
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths})
    try:
        wait_for((tmp_path / "half").exists)
        (process,) = Doing("writes", tmp_path).tries()
        assert is_running(process)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not is_running(process))
