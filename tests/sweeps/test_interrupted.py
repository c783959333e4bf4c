"""Killed workers, failed runs and interrupted sweeps: nothing is lost or done twice."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from multiprocessing import active_children
from pathlib import Path
from threading import Event, Thread

import pyarrow.parquet as pq
import pytest
import yaml

from coprune.base import pool
from coprune.base.pool import Cause, LocalWorkers, run_all
from coprune.report.schema import Report
from coprune.sweeps.job import RunJob
from support.commands import run_command
from support.pico_sweep import THREADS, alone, make_place, measured, pico_sweep, sweep_data


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_place(tmp_path))
    return tmp_path


def test_a_killed_worker_loses_nothing_and_does_nothing_twice(place: Path) -> None:
    sweep, runs = pico_sweep(method=["wanda", "sparsegpt"], nsamples=32, save_model="models")
    workers, killed, ended = LocalWorkers(place / "log.txt"), list[int](), Event()
    workers.at_once = 2

    def kill() -> None:
        while not (written := list(place.glob("models/.*.partial/model-*.safetensors"))):  # finished blocks
            if ended.wait(0.001):
                return
        worker = min(active_children(), key=lambda child: child.name)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        killed.append(len(written))

    jobs = [RunJob(run, "run", sweep.folder, THREADS, memory=0) for run in runs]
    killing = Thread(target=kill)
    killing.start()
    try:
        outcomes = [(job.name, outcome) for job, outcome in run_all(jobs, workers, 1)]
    finally:
        workers.stop()
        ended.set()
        killing.join()
    assert killed
    assert Counter(name for name, outcome in outcomes if outcome.cause is None) == {run.name: 1 for run in runs}
    (lost,) = (outcome for _, outcome in outcomes if outcome.cause is not None)
    assert (lost.cause, lost.again) == (Cause.LOST, True)
    for run in runs:
        assert measured(Report.read(run.recipe.run_folder / "report.json")) == measured(alone(run, place / "separate"))


def test_a_sweep_continues_past_failures_and_reports_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = sweep_data(model=["missing", "model"], method="magnitude", seed=[0, 1])
    (place / "table.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    ended = run_command(["sweep", "table.yaml", "--workers", "1", "--threads", "1"], monkeypatch, capsys)
    assert ended.code == 2
    lines = [
        line for line in ended.err.splitlines() if not line.startswith("Runs:")
    ]  # without the progress bar of a slow machine
    assert Counter(line.split()[0] for line in lines) == {"done": 2, "failed": 2, "coprune:": 1}
    assert "2 of 4 runs failed" in lines[-1]
    rows = list(csv.DictReader((place / "out/results.csv").open(encoding="utf-8")))
    assert [row["state"] for row in rows] == ["failed", "failed", "done", "done"]
    assert all("missing" in row["error"] for row in rows[:2])
    found = [row["perplexity test.txt"] for row in pq.read_table(place / "out/results.parquet").to_pylist()]
    assert found == [None, None, *(float(row["perplexity test.txt"]) for row in rows[2:])]
    assert "missing" in (place / "out/failures.txt").read_text()
    assert "2 of 4 runs are done" in (place / "out/results.md").read_text()


@pytest.mark.slow
def test_an_interrupted_sweep_resumes(
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
        os.killpg(process.pid, signal.SIGINT)  # like a terminal
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
    assert "in 2 sessions" in again.out


def test_a_run_too_large_for_every_machine_is_not_started(
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
