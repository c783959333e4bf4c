"""The number of parallel runs, and the resources of each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coprune.base.pool import Capacity, Cause
from coprune.run.memory_estimate import DevicePeak, Estimate
from coprune.run.reuse import KeptEstimate, estimate_key
from coprune.store.store import Store
from coprune.sweeps.execution import Plan
from coprune.sweeps.execution_settings import ExecutionSettings
from coprune.sweeps.expand import expand
from coprune.sweeps.file import SHARED_FOLDER, Sweep

GB = 10**9


def plan_of(
    folder: Path, sizes: Any, capacity: Capacity, how: ExecutionSettings | None = None, **settings: Any
) -> Plan:
    """Return a plan for one run per size, each of a different kind; None means no estimate."""
    data = {"model": "pico", "nsamples": list(range(1, len(sizes) + 1)), "save": str(folder)} | settings
    sweep = Sweep.make(data)
    runs = expand(sweep)
    for run, size in zip(runs, sizes, strict=True):
        if size is not None:
            told = size if isinstance(size, Estimate) else Estimate(size, None, GB)
            estimated = partial(KeptEstimate, estimate=told)
            Store(folder / SHARED_FOLDER).get(estimate_key(run.recipe), KeptEstimate, estimated)
    return Plan(sweep, how or ExecutionSettings(), SimpleNamespace(capacity=capacity, at_once=0), runs)


@pytest.mark.parametrize(
    ("capacity", "how", "at_once", "threads"),
    [
        (Capacity(16, 100 * GB, 0, 16, 100 * GB), ExecutionSettings(), 4, 4),  # all of them
        (Capacity(16, 7 * GB, 0, 16, 7 * GB), ExecutionSettings(), 2, 8),  # as many as memory allows
        (Capacity(2, 100 * GB, 0, 2, 100 * GB), ExecutionSettings(), 2, 1),  # as many as cores
        (
            Capacity(16, 100 * GB, 0, 16, 100 * GB),
            ExecutionSettings(workers=3, threads=2),
            3,
            2,
        ),  # as many as requested
        (Capacity(16, 100 * GB, 2, 16, 100 * GB), ExecutionSettings(), 2, 8),  # one per GPU
        (Capacity(64, 400 * GB, 0, 8, 50 * GB), ExecutionSettings(), 4, 8),  # no more cores than a machine has
        (Capacity(16, None, 0, 16, None), ExecutionSettings(), 4, 4),  # memory unknown
    ],
)
def test_cores_and_memory_are_divided_among_runs(
    capacity: Capacity, how: ExecutionSettings, at_once: int, threads: int, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, [3 * GB] * 4, capacity, how)
    assert plan.to_estimate() == []
    jobs = plan.to_run()
    assert plan.workers.at_once == at_once
    assert [(job.threads, job.memory, job.gpu) for job in jobs] == [(threads, 3 * GB, capacity.gpus > 0)] * 4


def test_unknown_sizes_are_estimated_first_and_once_per_kind(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [3 * GB, None, None], Capacity(4, 9 * GB, 0, 4, 9 * GB))
    assert [job.run.name for job in plan.to_estimate()] == ["nsamples-2", "nsamples-3"]
    # Runs that differ in seed and pattern are of one kind.
    plan = plan_of(
        tmp_path, [None] * 4, Capacity(4, 9 * GB, 0, 4, 9 * GB), nsamples=9, seed=[0, 1], pattern=["2:4", "4:8"]
    )
    assert [job.run.name for job in plan.to_estimate()] == ["seed-0/2-4"]
    # With a single worker nothing has to be decided.
    assert plan_of(tmp_path, [None], Capacity(4, 9 * GB, 0, 4, 9 * GB)).to_estimate() == []


def test_a_run_without_an_estimate_runs_alone_and_one_without_a_check_reserves_nothing(tmp_path: Path) -> None:
    capacity = Capacity(4, 9 * GB, 0, 4, 9 * GB)
    assert [job.memory for job in plan_of(tmp_path, [3 * GB, None], capacity).to_run()] == [3 * GB, None]
    assert [job.memory for job in plan_of(tmp_path, [3 * GB, None], capacity, check_memory=False).to_run()] == [0, 0]


def test_a_too_large_run_is_refused_and_a_slightly_too_large_one_runs_alone(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [3 * GB, 10 * GB, 40 * GB], Capacity(8, 18 * GB, 0, 4, 9 * GB))
    assert [job.memory for job in plan.to_run()] == [3 * GB, 9 * GB]
    assert [(run, why.cause) for run, why in plan.too_large.items()] == [("nsamples-3", Cause.REFUSED)]
    assert "would not fit" in plan.too_large["nsamples-3"].text


def test_a_run_on_a_gpu_is_planned_by_gpu_and_host_memory(tmp_path: Path) -> None:
    """Memory on the GPU is neither reserved nor required on the host."""

    def on_gpu(needed: int) -> Estimate:
        return Estimate(2 * GB, None, GB, device=DevicePeak("cuda:0", needed, 80 * GB, 0))

    plan = plan_of(tmp_path, [on_gpu(60 * GB), on_gpu(120 * GB)], Capacity(8, 16 * GB, 1, 8, 16 * GB))
    jobs = plan.to_run()
    assert [job.memory for job in jobs] == [2 * GB]
    (refused,) = plan.too_large.values()
    assert refused.cause is Cause.REFUSED
    assert "111.76 of 74.5 GiB on cuda:0" in refused.text
