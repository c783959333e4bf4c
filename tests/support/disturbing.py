"""Work in a child that is killed at a moment or a system call, or whose disk is full."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coprune.base.errors import CopruneError
from coprune.base.files import is_unfinished
from support.forking import forked

Work = Callable[[Path], object]
"""The work of a run, given its output folder."""
_SLOW = 300  # seconds after which a child counts as hanging


class Calls:
    """Counts the system calls by which this process changes a folder, and kills it at one of them."""

    def __init__(self, folder: Path, kill_at: int | None = None) -> None:
        self._folder, self._kill_at, self.count = str(folder), kill_at, 0
        sync = os.fsync

        def synced(fd: Any) -> None:
            self._take()
            sync(fd)

        os.fsync = synced
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
        if event == "open":
            writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and str(arguments[0]).startswith(self._folder):
            self._take()

    def _take(self) -> None:
        self.count += 1
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(
    work: Work, out: Path, *, kill_after: float | None = None, kill_at: int | None = None, largest: int | None = None
) -> int:
    """Do some work in a child; return its exit code, negative if it was killed.

    kill_after: seconds until it is killed; kill_at: number of the system call at which it is killed; largest: maximum
    bytes of a file, as on a full disk. A known error gives exit code 3, any other 1.
    """
    child = forked(lambda: _work(work, out, kill_at, largest))
    started = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if passed > (kill_after if kill_after is not None else _SLOW):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)


def _work(work: Work, out: Path, kill_at: int | None, largest: int | None) -> None:
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(out / "cache")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, unlimited[1]))
    calls = Calls(out, kill_at)
    try:
        work(out)
    except CopruneError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)  # messages may go to a file, too
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(3)
    (out.parent / "calls.json").write_text(json.dumps(calls.count))


def left_in(out: Path, *known: str) -> list[str]:
    """List unexpected files in a folder after a run. known: expected ones."""
    foreign = [path.name for path in out.iterdir() if path.name not in known]
    names = [path for path in out.rglob(".*") if is_unfinished(path) or path.name.startswith(".tmp")]
    return [*foreign, *(str(path.relative_to(out)) for path in names if path.parent != out)]
