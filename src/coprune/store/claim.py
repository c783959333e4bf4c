"""Claims: of all processes that want the same work one does it, and a killed one releases its claim."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class Taken(Exception):
    """Another process holds the claim."""


@contextmanager
def claimed(file: Path) -> Iterator[None]:
    """Wait for a claim and hold it within the body.

    The system releases it when the process ends, however that happens.

    Args:
        file: a lock file, created with its folder and left in place.
    """
    lock = _lock(file)
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


class Claim:
    """A claim of this process, held until it is closed, collected, or claimed again by the same process.

    So an interrupted call in a notebook does not block the next one.
    """

    _held: dict[tuple[int, Path], FileLock] = {}  # noqa: RUF012

    def __init__(self, file: Path) -> None:
        """Claim a lock file, created with its folder. Raises Taken if another process holds it."""
        place = os.getpid(), file.absolute()
        if (earlier := self._held.pop(place, None)) is not None:
            earlier.release()
        self.close: Callable[[], object] = lambda: None
        lock = _lock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise Taken(f"another process holds {file}") from None
        except NotImplementedError:  # a file system without locks
            return
        self._held[place] = lock
        self.close = weakref.finalize(self, _release, place, lock)


def _lock(file: Path) -> FileLock:
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file)


def _release(place: tuple[int, Path], lock: FileLock) -> None:
    if Claim._held.get(place) is lock:
        del Claim._held[place]
    if place[0] == os.getpid():  # a forked child shares the lock
        lock.release()
