"""Large files that are there whole or not at all, also after a crash of the machine."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coprune.base.errors import CopruneError

_NAME_BYTES = 200  # of a name, which has 255 at most
_MARK = "coprune"
_OWN = re.compile(rf"\..+\.{_MARK}-[0-9a-f]{{8}}")
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the share of the disk is used up",
    errno.EFBIG: "files may not be as large here",
}


def write_durably(file: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path, and rename what it wrote to `file` once it is on the disk.

    The path is in a folder of its own beside `file`, so that temporary files of the library that writes lie there too.
    Raises CopruneError if the disk is full; nothing is left on any error.
    """
    _write(file, write, wait=True)
    sync(file.parent)


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """The same without waiting for the disk: a crash of the machine may leave a damaged file, until `sync` is called."""
    _write(file, write, wait=False)


def _write(file: Path, write: Callable[[Path], object], wait: bool) -> None:
    whole, lock = file.with_name(f"{_start_of_name(file)}{secrets.token_hex(4)}"), None
    try:
        with full_disk_explained(file):
            with own_folder(file) as folder:
                temporary = folder / file.name
                temporary.touch(exist_ok=False)
                mode = temporary.stat().st_mode
                write(temporary)
                temporary.chmod(mode)  # as any new file's; safetensors makes its own private
                if wait:
                    sync(temporary)
                lock = os.open(temporary, os.O_RDONLY)
                _locks(lock)
                temporary.replace(whole)
            whole.replace(file)  # last: a kill after that leaves nothing beside the file
    finally:
        whole.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def own_folder(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside a target for this process alone, and remove what is left of it in the end.

    What killed processes left beside the same target is removed first; a lock, which ends with the process that holds it,
    tells theirs from those of processes that are at work.
    """
    remove_left_beside(target)
    folder, lock = _begin(target.with_name(_start_of_name(target)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _begin(start: Path) -> tuple[Path, int]:
    """Make a folder whose name starts so, and lock it."""
    while True:
        folder = start.with_name(f"{start.name}{secrets.token_hex(4)}")
        folder.mkdir()
        with suppress(FileNotFoundError):  # somebody else took it for one that was left
            lock = os.open(folder, os.O_RDONLY)
            if _locks(lock) is not False and folder.is_dir():
                return folder, lock
            os.close(lock)


def is_unfinished(path: Path) -> bool:
    """Whether a path is named as what is being written, or was when its process was killed."""
    return _OWN.fullmatch(path.name) is not None


def _start_of_name(target: Path) -> str:
    return f".{os.fsencode(target.name)[:_NAME_BYTES].decode(errors='ignore')}.{_MARK}-"


def remove_left_beside(target: Path) -> None:
    """Remove what processes left beside a target that were killed while they wrote it."""
    _remove_left(target.parent, f"{glob.escape(_start_of_name(target))}*")


def remove_unfinished(folder: Path) -> None:
    """Remove what processes left in a folder that were killed while they wrote into it."""
    _remove_left(folder, f".*.{_MARK}-*")


def _remove_left(place: Path, pattern: str) -> None:
    for left in filter(is_unfinished, place.glob(pattern)):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            if _locks(lock) and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif _locks(lock):
                left.unlink()
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


@contextmanager
def full_disk_explained(file: Path) -> Iterator[None]:
    """Raise CopruneError where the disk is full, or a file is larger than it may be."""
    try:
        yield
    except Exception as error:
        cause = _why_not_written(error)
        if cause is None:
            raise
        raise CopruneError(f"{cause}: {file} could not be written", fix="free some space and go on") from error


def _why_not_written(error: Exception) -> str | None:
    """What an error of writing says of the disk; None if it is about something else."""
    number, said = getattr(error, "errno", None), str(error)
    for code, cause in _FULL.items():
        if number == code or os.strerror(code) in said:  # safetensors has words of its own around the system's
            return cause
    # torch and numpy say neither the file nor the cause.
    silent = ("PytorchStreamWriter", "inline_container", " requested and ")
    return "the disk is full or cannot be written" if any(words in said for words in silent) else None


def name_durably(partial: Path, folder: Path) -> None:
    """Give a whole folder its name, once everything in it is on the disk.

    Raises OSError, rather than overwrites, if something is there.
    """
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    partial.replace(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
