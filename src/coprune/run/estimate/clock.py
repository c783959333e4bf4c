"""Time as a run on a machine of its own would take it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch

from coprune.base.devices import in_host_memory, synchronize

DISK = 200e6
"""Bytes that a slow disk reads in a second."""


def seconds_of_call(run: Callable[[], object], device: torch.device, once: bool = False) -> float:
    """Seconds of a call; the smaller of two, unless it is to be called once only or takes long.

    On the CPU they are of this thread's processor time: it takes part in every product beside torch's other threads, so
    that is how long the call takes if nobody else wants the cores, which go by much slower on a busy machine.
    """
    clock = time.thread_time if in_host_memory(device) else time.perf_counter
    times: list[float] = []
    while not times or (not once and len(times) < 2 and times[0] < 0.3):
        started = clock()
        run()
        synchronize(device)
        times.append(clock() - started)
    return min(times)


class Busyness:
    """How busy others keep the machine while something is computed, which the time of a machine of its own leaves out.

    Args:
        device: where it is computed; what goes by on another device than the CPU is counted anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = in_host_memory(device)
        self.factor = 1.0
        """How many times as long as its processor time it took."""

    def __enter__(self) -> Self:
        self._began = time.perf_counter(), time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        gone, computed = time.perf_counter() - self._began[0], time.thread_time() - self._began[1]
        if self._counts and computed > 0:
            self.factor = max(1.0, gone / computed)


def seconds_of_reading(read: Callable[[], object]) -> float:
    """Seconds of a call that reads files: all processor time of the process, and what a slow disk takes, but no more
    than went by."""
    from_disk, started, computed = _bytes_from_disk(), time.perf_counter(), time.process_time()
    read()
    computed, gone = time.process_time() - computed, time.perf_counter() - started
    return min(gone, computed + (_bytes_from_disk() - from_disk) / DISK)


def _bytes_from_disk() -> int:
    """Bytes that this process made the system read from a disk, not from what it keeps in memory; 0 if it does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)
