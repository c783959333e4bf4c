"""Time is told as a machine of its own would take it, whatever else this one does."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from coprune.run.estimate.block import seconds_of_call, seconds_of_reading

CPU = torch.device("cpu")


@contextmanager
def busy_machine() -> Iterator[None]:
    """Three processes for every core want it too."""
    children = []
    for _ in range(3 * len(os.sched_getaffinity(0))):
        child = os.fork()
        if child == 0:
            while True:
                pass
        children.append(child)
    try:
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs processes that are bound to cores")
def test_a_busy_machine_does_not_stretch_the_time() -> None:
    x = torch.randn(512, 512)

    def work() -> None:
        for _ in range(20):
            x @ x

    work()
    alone = min(seconds_of_call(work, CPU) for _ in range(3))
    with busy_machine():
        started = time.perf_counter()
        busy = min(seconds_of_call(work, CPU, once=True) for _ in range(2))
        gone = time.perf_counter() - started
    assert busy < 2 * alone
    assert gone / 2 > 1.5 * busy, "the machine was not busy, so this shows nothing"


def test_waiting_for_the_processor_is_not_counted() -> None:
    assert seconds_of_call(lambda: time.sleep(0.2), CPU) < 0.05


def test_reading_what_the_system_keeps_takes_its_processor_time(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))

    def read() -> None:
        file.read_bytes()
        time.sleep(0.2)

    assert seconds_of_reading(read) < 0.1
