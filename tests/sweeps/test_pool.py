"""Worker processes that are killed, runs that fail, sweeps that are interrupted: nothing is lost, nothing done twice."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from coprune.recipe.recipe import Recipe
from coprune.report.schema import Report
from coprune.runner import run_recipe
from coprune.sweeps import pool
from coprune.sweeps.events import Cause, Doing, Done, JobEvent, NotDone
from coprune.sweeps.pool import LocalWorkers
from coprune.sweeps.run import conduct
from coprune.sweeps.worker import Capacity, Job, Work, do_job
from support.commands import run_command
from support.forking import forked
from support.pico_sweep import THREADS, alone, make_place, measured, pico_sweep, sweep_data


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_place(tmp_path))
    return tmp_path


def test_a_killed_worker_loses_nothing_and_does_nothing_twice(place: Path) -> None:
    sweep, runs = pico_sweep(method=["wanda", "sparsegpt"], nsamples=32, save_model="models")
    workers = LocalWorkers(place / "log.txt")
    workers.at_once = 2
    events, killed = list[JobEvent](), list[str]()

    def listen(event: JobEvent, again: bool) -> None:
        events.append(event)
        # Its first block is written by now, and in the journal or about to be.
        if event == Doing(event.run, "pruning, 1 blocks done") and not killed:
            worker = next(worker for worker, job in workers._busy if job.name == event.run)
            assert worker.process.pid is not None
            os.kill(worker.process.pid, signal.SIGKILL)
            killed.append(event.run)

    jobs = [Job(run, "run", sweep.folder, THREADS, memory=0) for run in runs]
    try:
        conduct(jobs, workers, 1, listen)
    finally:
        workers.stop()
    assert Counter(event.run for event in events if isinstance(event, Done)) == {run.name: 1 for run in runs}
    (lost,) = (event for event in events if isinstance(event, NotDone))
    assert (lost.run, lost.cause) == (killed[0], Cause.LOST)
    assert "SIGKILL" in lost.text
    doing = [event for event in events if isinstance(event, Doing) and event.run == killed[0]]
    blocks = [event for event in doing if event.text.endswith("blocks done")]
    assert len(blocks) <= 4  # of three blocks only one that was not in the journal yet was pruned again
    for run in runs:
        assert measured(Report.read(run.recipe.run_folder / "report.json")) == measured(alone(run, place / "separate"))


def test_a_worker_has_the_environment_of_who_hires_it(tmp_path: Path) -> None:
    """And not that of the time at which the process was begun from which it is forked."""
    ours, theirs = Pipe()
    ours.close()  # so there is no work

    def work() -> None:
        sys.stdout = sys.stderr = (tmp_path / "said.txt").open("w")
        pool._work(theirs, None, tmp_path / "log.txt", {"COPRUNE_HIRED": "now"})
        assert os.environ["COPRUNE_HIRED"] == "now"

    assert os.waitpid(forked(work), 0)[1] == 0


def test_a_sweep_goes_on_past_failures_and_reports_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = sweep_data(model=["missing", "model"], method="magnitude", seed=[0, 1])
    (place / "table.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    ended = run_command(["sweep", "table.yaml", "--workers", "1", "--threads", "1"], monkeypatch, capsys)
    assert ended.code == 2
    lines = ended.err.splitlines()
    assert Counter(line.split()[0] for line in lines) == {"done": 2, "failed": 2, "coprune:": 1}
    assert "2 of 4 runs failed" in lines[-1]
    rows = list(csv.DictReader((place / "out/results.csv").open(encoding="utf-8")))
    assert [row["state"] for row in rows] == ["failed", "failed", "done", "done"]
    assert all("missing" in row["error"] for row in rows[:2])
    found = [row["perplexity test.txt"] for row in pq.read_table(place / "out/results.parquet").to_pylist()]
    assert found == [None, None, *(float(row["perplexity test.txt"]) for row in rows[2:])]
    assert "missing" in (place / "out/failures.txt").read_text()
    assert "2 of 4 runs are done" in (place / "out/results.md").read_text()


class Here:
    """Does jobs in this process, one at a time."""

    capacity = Capacity(1, None, 0, 1, None)
    at_once = 1

    def __init__(self) -> None:
        self.told: list[JobEvent] = []

    def has_room(self, job: Work) -> bool:
        return not self.told

    def start(self, job: Work) -> None:
        do_job(job, self.told.append)

    def events(self, seconds: float) -> list[JobEvent]:
        told, self.told = self.told, []
        return told

    def stop(self) -> None:
        """There is nothing to end."""


@pytest.mark.parametrize("crashes", [1, 2])
def test_an_unforeseen_error_is_retried_and_in_the_end_reported(
    crashes: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs = pico_sweep(method=["magnitude", "wanda"])
    left, real = [crashes], run_recipe.run_recipe

    def crashing(recipe: Recipe, *others: Any, **named: Any) -> Any:
        if recipe.prune.method.name == "magnitude" and left[0]:
            left[0] -= 1
            raise RuntimeError("out of luck")
        return real(recipe, *others, **named)

    monkeypatch.setattr(run_recipe, "run_recipe", crashing)
    ends: list[tuple[Any, bool]] = []
    jobs = [Job(run, "run", sweep.folder, THREADS) for run in runs]
    conduct(jobs, Here(), 1, lambda event, again: ends.append((event, again)) if not isinstance(event, Doing) else None)
    first, second, last = ends
    assert (first[0].run, first[0].cause, first[1]) == ("magnitude", Cause.BROKEN, True)
    assert "RuntimeError: out of luck" in first[0].text
    assert isinstance(second[0], Done if crashes == 1 else NotDone)
    assert second[1] is False
    assert (last[0].run, type(last[0])) == ("wanda", Done)


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_stopped(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = sweep_data(method=["magnitude", "sparsegpt"], seed=[0, 1], nsamples=64)
    (place / "table.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    command = ["sweep", "table.yaml", "--workers", "1", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "coprune", *command], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while not (place / "out/magnitude/seed-0/report.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped" in err
    assert "Traceback" not in err
    done = {file: file.stat().st_mtime_ns for file in place.glob("out/**/report.json")}
    assert 1 <= len(done) < 4
    rows = list(csv.DictReader((place / "out/results.csv").open(encoding="utf-8")))
    assert Counter(row["state"] for row in rows) == {"done": len(done), "not done": 4 - len(done)}
    ended = run_command(command, monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert len(list(place.glob("out/**/report.json"))) == 4
    again = run_command(command, monkeypatch, capsys)
    assert again.code == 0
    assert not again.err
    assert "in 2 sittings" in again.out


def test_a_run_that_no_machine_has_the_memory_for_is_not_started(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool, "available_bytes", lambda: 10_000)
    data = sweep_data(method=["magnitude"], check_memory=True, seed=[0, 1])
    Path("table.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    ended = run_command(["sweep", "table.yaml", "--workers", "2"], monkeypatch, capsys)
    assert ended.code == 2
    assert "2 of 2 runs failed" in ended.err
    assert "would not fit" in ended.err
    assert not (place / "out/magnitude").exists()
