"""A folder that is there whole or not at all, also after a kill or a crash of the machine."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coprune.base.durable import full_disk_explained, name_durably

_MARK = "coprune"


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, which gets its name when the block ends well, and is removed otherwise.

    Its content is on the disk before it gets its name. What killed processes left of the same target is removed first;
    a lock, which ends with the process that holds it, tells theirs from those of processes that are at work.

    Args:
        target: one that does not exist, or is empty.

    Raises:
        CopruneError: the disk is full.
        OSError: something took the name meanwhile, or nothing can be written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(target)
    out, lock = _begin(target)
    try:
        with full_disk_explained(target):
            yield out
            _as_readable(out)
            name_durably(out, target)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _begin(target: Path) -> tuple[Path, int]:
    """A folder of our own and the lock on it."""
    while True:
        out = target.with_name(f".{target.name}.{_MARK}-{secrets.token_hex(4)}")
        out.mkdir()
        with suppress(FileNotFoundError):  # somebody else took it for one that was left
            lock = os.open(out, os.O_RDONLY)
            if _locks(lock) is not False and out.is_dir():
                return out, lock
            os.close(lock)


def _as_readable(folder: Path) -> None:
    """Let all files be as readable as the folder is; safetensors makes its own private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _remove_left(target: Path) -> None:
    for folder in target.parent.glob(f".{glob.escape(target.name)}.{_MARK}-????????"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            if _locks(lock):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locks(descriptor: int) -> bool | None:
    """Take a lock; False if another holds it, None on a file system that has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
