"""The cache of evaluations between processes: one measures, the others wait and read; a killed one is in nobody's way."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

from coprune.evaluation.result_cache import EvaluationCache
from support.forking import forked


class Found(BaseModel):
    by: str


def begin(folder: Path, name: str, seconds: float) -> int:
    """Ask for the same entry in a child, which takes so long to measure it, and says when it begins and what it got."""

    def measure() -> Found:
        (folder / f"{name}.begun").touch()
        time.sleep(seconds)
        return Found(by=name)

    def ask() -> None:
        found = EvaluationCache(folder / "kept").get("key", Found, measure)
        (folder / f"{name}.got").write_text(found.by)

    return forked(ask)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} never came"
        time.sleep(0.005)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_second_waits_and_reads(tmp_path: Path) -> None:
    first = begin(tmp_path, "first", 0.3)
    wait_for(tmp_path / "first.begun")
    second = begin(tmp_path, "second", 0.0)
    assert [ended(first), ended(second)] == [0, 0]
    assert (tmp_path / "second.got").read_text() == (tmp_path / "first.got").read_text() == "first"
    assert not (tmp_path / "second.begun").exists()
    # Another entry is nobody's to wait for, and what failed leaves nothing.
    cache = EvaluationCache(tmp_path / "kept")
    assert cache.find("other", Found) is None
    with pytest.raises(ZeroDivisionError):
        cache.get("other", Found, lambda: Found(by=str(1 / 0)))
    assert cache.get("other", Found, lambda: Found(by="me")).by == "me"
    assert EvaluationCache(None).find("key", Found) is None


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    first = begin(tmp_path, "first", 60)
    wait_for(tmp_path / "first.begun")
    second = begin(tmp_path, "second", 0.0)
    time.sleep(0.1)
    assert not (tmp_path / "second.begun").exists()
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    assert ended(second) == 0
    assert (tmp_path / "second.got").read_text() == "second"
