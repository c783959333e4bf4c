"""A forked child process, and long library calls in one: Python handles no signal in such a call, but can end a child."""

from __future__ import annotations

import math
import os
import pickle
import resource
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import NoReturn, TypeVar

from coprune.base.errors import LostProcess

Result = TypeVar("Result")


class OutOfTime(Exception):
    """The deadline of some work has passed."""


def fork() -> int:
    """Fork this process like `os.fork`. The child may use no lock that another thread could hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of threads in the parent
        return os.fork()


def begin_child(*kept: int) -> None:
    """Restore default signal handling in a forked child, and close inherited files except standard streams and `kept`."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    # The child must not hold this process's locks and pipes.
    edges = [2, *sorted(kept), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
    for before, after in pairwise(edges):
        os.closerange(before + 1, min(after, 1 << 16))


def end_child(process: int) -> None:
    """Kill a child, if it has not ended, and wait for its end."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def interruptible(work: Callable[[], Result], until: float = math.inf) -> Result:
    """Call a function in a child process, which ends with this process or at an exception here; return its result.

    Args:
        work: a long call into a library, which may not use torch's threads. What it returns or raises is pickled.
        until: deadline in `time.perf_counter()`, at which the child is killed.

    Raises:
        LostProcess: the child was killed by something else.
        OutOfTime: the deadline has passed.
    """
    (told, tell), (alive, living) = os.pipe(), os.pipe()
    process = fork()
    if process == 0:
        _work(work, tell, alive)
    try:
        os.close(tell)
        os.close(alive)
        with os.fdopen(told, "rb") as stream:
            left = None if until == math.inf else max(0.0, until - time.perf_counter())
            if not select.select([stream], [], [], left)[0]:
                raise OutOfTime("the time for this step is over")
            answer = stream.read()
    finally:
        end_child(process)
        os.close(living)
    if not answer:
        hint = "by a signal, as the system does when memory runs out"
        raise LostProcess(f"a process of this command was killed ({hint})")
    found, error = pickle.loads(answer)
    if error is not None:
        raise error
    result: Result = found
    return result


def _work(work: Callable[[], Result], tell: int, alive: int) -> NoReturn:
    """Do the work of a child, send the result and end the process."""
    try:
        begin_child(tell, alive)
        threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
        try:
            answer = pickle.dumps((work(), None))
        except Exception as error:
            answer = pickle.dumps((None, error))
        with os.fdopen(tell, "wb") as stream:
            stream.write(answer)
    finally:
        os._exit(0)


def _end_with(alive: int) -> None:
    """End this process with its parent, which holds the other end of a pipe."""
    os.read(alive, 1)
    os._exit(1)
