"""Work in a fork of this process, which has imported everything already."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import RLock

from tqdm import tqdm  # type: ignore[import-untyped]


def forked(work: Callable[[], object]) -> int:
    """Start some work in a child.

    Returns:
        Its process id. It exits with 0, with the code of a SystemExit, or with 1 and a traceback for any other error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads, none of which the child uses
        child = os.fork()
    if child != 0:
        return child
    tqdm.set_lock(RLock())  # its own lock is shared by all forks, and one of them may be killed while it holds it
    code = 1
    try:
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for(path: Path) -> None:
    """Wait for a file written by another process."""
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} never came"
        time.sleep(0.005)


def ended(child: int) -> int:
    """Wait for a forked process and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
