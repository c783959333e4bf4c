"""Work in a child process, which can be ended while a library computes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from coprune.base.child import OutOfTime, fork, interruptible
from coprune.base.errors import BadInput, LostProcess
from support.forking import forked, wait_for


def test_a_result_or_an_error_comes_back() -> None:
    def refuse() -> str:
        raise BadInput("it is too small", field="size", value=1, fix="take more")

    assert interruptible(lambda: "x" * 1_000_000) == "x" * 1_000_000
    with pytest.raises(BadInput) as raised:
        interruptible(refuse)
    error = raised.value
    assert (error.cause, error.field, error.value, error.fix) == ("it is too small", "size", 1, "take more")


def test_a_killed_child_is_reported() -> None:
    with pytest.raises(LostProcess, match="was killed"):
        interruptible(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_call_is_interrupted_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    children, began = list[int](), time.perf_counter()

    def noted() -> int:
        children.append(fork())
        return children[-1]

    monkeypatch.setattr("coprune.base.child.fork", noted)
    with pytest.raises(OutOfTime):
        interruptible(lambda: ctypes.CDLL(None).sleep(60), began + 0.2)
    assert time.perf_counter() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


@pytest.mark.parametrize("killed", [True, False])
def test_a_call_ends_with_its_process_or_with_an_exception_there(tmp_path: Path, killed: bool) -> None:
    """A lock tells that the child is gone."""
    (lock := tmp_path / "lock").touch()

    def long() -> None:
        fcntl.flock(os.open(lock, os.O_RDONLY), fcntl.LOCK_EX)
        (tmp_path / "begun").touch()
        ctypes.CDLL(None).sleep(60)

    parent = forked(lambda: interruptible(long))
    wait_for(tmp_path / "begun")
    os.kill(parent, signal.SIGKILL if killed else signal.SIGINT)
    os.waitpid(parent, 0)
    descriptor, until = os.open(lock, os.O_RDONLY), time.monotonic() + 20
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            assert time.monotonic() < until, "the child is still there"
            time.sleep(0.01)
    os.close(descriptor)
