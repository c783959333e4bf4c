"""All kinds of work on a simulated device as strict as CUDA, compared with the CPU.

A device is registered for a whole process, so the cases run in a separate one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support.simdevice.compile_device import missing
from support.torchrun import ENVIRONMENT

KINDS = ("methods", "walk", "removal", "fine-tuning", "evaluation", "images", "memory")
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """Return the output of the cases' process: a line per case, and one with the counts of stages."""
    if reason := missing():
        pytest.skip(reason)
    command = [sys.executable, "-m", "support.simdevice.run_cases", "--json"]
    done = subprocess.run(command, cwd=TESTS, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=500)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    # Ended by a signal: the host read a device address.
    assert done.returncode in (0, 1), f"after {lines[-1:]}: {done.stderr[-2000:]}"
    return lines


@pytest.fixture(scope="module")
def outcomes(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return told[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_device_matches_the_cpu(outcomes: list[Mapping[str, Any]], kind: str) -> None:
    cases = [case for case in outcomes if case["kind"] == kind]
    assert cases
    assert [f"{case['name']}: {case['said']}" for case in cases if not case["passed"]] == []


def test_every_kind_of_case_runs_on_the_simulated_device(outcomes: list[Mapping[str, Any]]) -> None:
    assert {case["kind"] for case in outcomes} == set(KINDS)


def test_no_stage_exceeds_its_recorded_device_operations(told: list[dict[str, Any]]) -> None:
    """After an intended change: `cd tests && python -m support.simdevice.stages --write`."""
    found, allowed = told[-1]["found"], told[-1]["allowed"]
    left_out = {stage for stage in allowed if stage.endswith(": a block") and stage not in found}
    assert found.keys() == allowed.keys() - left_out
    more = [
        f"{stage}: {counts[kind]} × {kind}, {most} in the table"
        for stage, counts in found.items()
        for kind, most in allowed[stage].items()
        if counts[kind] > most
    ]
    assert not more


def test_solving_a_matrix_waits_for_the_device_at_most_twice(told: list[dict[str, Any]]) -> None:
    waits = {stage: counts["sync"] for stage, counts in told[-1]["found"].items() if stage.endswith("matrix")}
    assert len(waits) > 40
    assert {stage: count for stage, count in waits.items() if count > 2} == {}
