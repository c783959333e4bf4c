"""A claim: of all processes that want to do the same work, one does it; a killed one lets go."""

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
    """Hold a claim while the body runs, after waiting for whoever holds it.

    The system releases it when the process ends, however that happens.

    Args:
        file: a lock file, which is made with its folder and stays.
    """
    lock = _lock(file)
    try:
        lock.acquire()
    except NotImplementedError:  # a file system that has no locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


class Claim:
    """A claim of this process, held until it is closed, collected, or claimed again by the same process.

    So what an interrupted call left claimed in a notebook is in nobody's way.
    """

    _held: dict[tuple[int, Path], FileLock] = {}  # noqa: RUF012

    def __init__(self, file: Path) -> None:
        """Claim a lock file, which is made with its folder. Raises Taken if another process holds it."""
        place = os.getpid(), file.absolute()
        if (earlier := self._held.pop(place, None)) is not None:
            earlier.release()
        self.close: Callable[[], object] = lambda: None
        lock = _lock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise Taken(f"another process holds {file}") from None
        except NotImplementedError:  # a file system that has no locks
            return
        self._held[place] = lock
        self.close = weakref.finalize(self, _release, place, lock)


def _lock(file: Path) -> FileLock:
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file)


def _release(place: tuple[int, Path], lock: FileLock) -> None:
    if Claim._held.get(place) is lock:
        del Claim._held[place]
    if place[0] == os.getpid():  # a forked child shares it
        lock.release()
