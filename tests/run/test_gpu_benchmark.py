"""benchmarks/gpu.py: sections that fail, hang or die, and a part of it on the simulated device."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
from gpu_sections.section import ENDING, Asked, Section
from gpu_sections.sections import SECTIONS

from support.simdevice.compile_device import missing
from support.torchrun import ENVIRONMENT

PASSED = gpu.Outcome("cases", True, "2 of 2", 3.0)
WRONG = gpu.Outcome("kernels", False, "1 of 2", 1.0)
UNMEASURED = gpu.Outcome("wide", False, "not done after 9 s", 9.0)


def outcome(code: str, seconds: float = 20) -> gpu.Outcome:
    return gpu.outcome_of("cases", [sys.executable, "-c", code], ENVIRONMENT, seconds)


def test_a_benchmark_section_reports_its_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    found = outcome(f"print('a table'); print({ENDING + json.dumps([True, 'all is well'])!r})")
    assert found[:3] == ("cases", True, "all is well")
    told = capsys.readouterr().out
    assert "a table\n" in told
    assert ENDING not in told
    assert outcome(f"print({ENDING + json.dumps([None, 'no model'])!r})")[1:3] == (None, "no model")


def test_a_section_that_raises_dies_or_hangs_fails(capsys: pytest.CaptureFixture[str]) -> None:
    found = outcome("print('half a table'); raise ValueError('wrong there')")
    assert found.passed is False
    assert "ended with 1" in found.said
    assert "ValueError: wrong there" in found.said
    found = outcome("import os; os.kill(os.getpid(), 11)")
    assert (found.passed, found.said.split(":")[0]) == (False, "ended with -11")
    started = time.monotonic()
    found = outcome("import time; print('begun', flush=True); time.sleep(60)", seconds=1)
    assert (found.passed, found.said) == (False, "not done after 1 s")
    assert time.monotonic() - started < 30
    told = capsys.readouterr().out
    assert "half a table" in told
    assert "begun" in told
    assert told.count("**Failed**") == 3


def test_a_section_without_time_is_skipped(tmp_path: Path) -> None:
    asked = Asked("cpu", 0.0, True, tmp_path, "")
    found = gpu.run_section("cases", Section("Cases", "nowhere:nothing", 100, True), asked, time.monotonic() + 1)
    assert found == ("cases", None, "no time", 0.0)


def test_unmeasured_sections_do_not_count_in_the_verdict() -> None:
    assert [gpu.failed(one) for one in (PASSED, WRONG, UNMEASURED)] == [False, True, False]
    assert "right as on the CPU, by 1 section.**" in gpu.verdict([PASSED, UNMEASURED])
    assert gpu.verdict([PASSED, UNMEASURED]).endswith("Could not be measured: wide.")
    assert "**Verdict: not right here. Failed: kernels.**" in gpu.verdict([PASSED, WRONG])
    assert "nothing was proven" in gpu.verdict([UNMEASURED])


def test_every_section_has_a_function_and_all_fit_in_ten_minutes() -> None:
    import importlib

    for section in SECTIONS.values():
        module, _, name = section.place.partition(":")
        assert callable(getattr(importlib.import_module(f"gpu_sections.{module}"), name))
    assert max(section.seconds for section in SECTIONS.values()) < 150


def test_a_missing_gpu_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("coprune.base.devices.accelerator", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "no GPU here" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "sim", "--sections", "cases,case"])
    assert gpu.main() == 2
    assert "no section 'case'" in capsys.readouterr().out


def on_the_simulated_device(*words: str) -> subprocess.CompletedProcess[str]:
    if reason := missing():
        pytest.skip(reason)
    command = [sys.executable, gpu.__file__, "--device", "sim", *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=400)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_the_simulated_device() -> None:
    done = on_the_simulated_device("--sections", "kernels,cases,full,tuning", "--cases", "many rows,checksums")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# coprune on sim (simulated)" in done.stdout
    assert "| walk_columns | torch | 15 cases, as published in float64 |" in done.stdout
    assert "2 of 2 cases gave what the CPU gives" in done.stdout
    assert "Simulated device out of memory" in done.stdout
    assert "the zeros stayed" in done.stdout
    assert "**Verdict: right as on the CPU, by 3 sections.**" in done.stdout


def test_a_wrong_section_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = f"print({ENDING + json.dumps([False, '1 of 2'])!r})"
    monkeypatch.setattr(gpu, "command_of", lambda name, asked: [sys.executable, "-c", wrong])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "sim", "--sections", "cases"])
    assert gpu.main() == 1
    assert "**Verdict: not right here. Failed: cases.**" in capsys.readouterr().out
