"""Kill a run at a chosen moment, given as a number of executed lines of coprune's code."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import coprune
from support.forking import forked

_SOURCE = str(Path(coprune.__file__).parent)
_SECONDS = 120  # after which a hanging child is ended


def count_lines(work: Callable[[], object], files: tuple[str, ...]) -> tuple[int, int]:
    """Do some work and count executed lines of coprune: all, and those in files whose paths contain one of `files`."""
    times = Counter[str]()

    def step(file: str) -> None:
        times[file] += 1

    _watched(work, step, ("",))
    counts = _one_of(files)
    return times.total(), sum(number for file, number in times.items() if counts(file))


def killed_at(work: Callable[[], object], line: int, files: tuple[str, ...] = ("",)) -> bool:
    """Do the work in a child that is killed with SIGKILL at its n-th line; return whether it was."""
    left = line

    def now() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    return _killed(work, now, files)


def killed_when(work: Callable[[], object], condition: Callable[[], bool], files: tuple[str, ...]) -> bool:
    """The same at the first line of some files at which a condition holds, such as the existence of a file."""
    return _killed(work, condition, files)


def _one_of(files: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a function that tests whether a path contains one of some words, each of which must match a file."""
    there = [str(path) for path in Path(_SOURCE).rglob("*.py")]
    assert all(any(word in path for path in there) for word in files), f"no file is called so: {files}"
    return functools.cache(lambda file: file.startswith(_SOURCE) and any(word in file for word in files))


def _killed(work: Callable[[], object], now: Callable[[], bool], files: tuple[str, ...]) -> bool:
    _, status = os.waitpid(forked(lambda: _be_killed(work, now, files)), 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed before it could be killed"
    return False


def _be_killed(work: Callable[[], object], now: Callable[[], bool], files: tuple[str, ...]) -> None:
    def step(file: str) -> None:
        if now():
            os.kill(os.getpid(), signal.SIGKILL)

    signal.alarm(_SECONDS)
    _watched(work, step, files)


def _watched(work: Callable[[], object], step: Callable[[str], None], files: tuple[str, ...]) -> None:
    counts = _one_of(files)

    def begun(frame: FrameType, event: str, argument: Any) -> Any:
        # Module-level code runs once per process, so it would not be counted again.
        return executed if counts(frame.f_code.co_filename) and frame.f_code.co_flags & inspect.CO_OPTIMIZED else None

    def executed(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            step(frame.f_code.co_filename)
        return executed

    before = sys.gettrace()
    sys.settrace(begun)
    try:
        work()
    finally:
        sys.settrace(before)
