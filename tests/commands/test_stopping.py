"""SIGTERM and Ctrl-C stop a command anywhere: inside code that swallows them, and in one of several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from coprune.commands import app
from support.commands import run_command


class Dying:
    """An object whose finaliser receives a signal; Python prints and discards what that raises."""

    def __init__(self, sent: signal.Signals) -> None:
        self._sent = sent

    def __del__(self) -> None:
        signal.raise_signal(self._sent)


def swallowed_by_a_finaliser(sent: signal.Signals) -> None:
    Dying(sent)


def swallowed_by_a_library(sent: signal.Signals) -> None:
    with suppress(BaseException):
        signal.raise_signal(sent)


def made_another_error(sent: signal.Signals) -> None:
    try:
        signal.raise_signal(sent)
    except BaseException:
        raise RuntimeError("a library's own") from None


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("swallow", [swallowed_by_a_finaliser, swallowed_by_a_library, made_another_error])
def test_a_signal_swallowed_by_a_library_still_stops_the_command(
    swallow: Callable[[signal.Signals], None],
    sent: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: object, **__: object) -> int:
        swallow(sent)
        for _step in range(1000):
            time.sleep(0.01)
        return 0

    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    monkeypatch.setattr(app, "_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(app, "app", work)
    before: object = signal.getsignal(sent)
    ended = run_command(["prune", "model"], monkeypatch, capsys)
    assert ended.code == code
    assert ended.err.endswith("under its final name. To resume, type: coprune prune model\n")
    assert signal.getsignal(sent) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert printed == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_ending_soon_after_a_swallowed_signal_counts_as_stopped(
    sent: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "app", lambda *_, **__: swallowed_by_a_library(sent))
    assert run_command(["export", "model"], monkeypatch, capsys).code == code


def test_a_signal_does_not_interrupt_the_cleanup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tidied = []

    def work(*_: object, **__: object) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            time.sleep(0.3)
            tidied.append(True)
        return 0

    monkeypatch.setattr(app, "_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(app, "app", work)
    assert run_command(["prune", "model"], monkeypatch, capsys).code == 143
    assert tidied == [True]


# A stand-in for a call that no signal handler can interrupt, in one of two processes.
WAITING = """
import ctypes, sys
from coprune.commands import app
def wait(*_, **__):
    print("waiting", flush=True)
    while True:
        ctypes.CDLL(None).usleep(600_000_000)
app.app = wait
sys.argv = ["coprune", "prune", "model"]
app.main()
"""


def test_a_stopped_process_of_several_prints_one_line() -> None:
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    running = subprocess.Popen(
        [sys.executable, "-c", WAITING], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "waiting\n"
    running.terminate()
    _, err = running.communicate(timeout=20)
    assert running.returncode == 143
    assert err == (
        "coprune: process 1 was told to stop, as all are when one ends. Run the same command again to resume.\n"
    )


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "coprune", "--version"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_command_works_with_stdout_closed() -> None:
    command = f"{sys.executable} -m coprune --version >&-"
    ended = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
