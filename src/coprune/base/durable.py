"""Large files that are there whole or not at all, also after a crash of the machine."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coprune.base.errors import CopruneError

TEMPORARY = ".tmp"
"""How the names of files end that are not whole yet."""
_NAME_LETTERS = 200  # of a name, which has 255 bytes at most
_IDLE_SECONDS = 3600.0
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the share of the disk is used up",
    errno.EFBIG: "files may not be as large here",
}


def write_durably(file: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `file`, and rename what it wrote once it is on the disk.

    Raises CopruneError if the disk is full; the temporary file is removed on any error.
    """
    _write(file, write, wait=True)
    sync(file.parent)


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """The same without waiting for the disk: a crash of the machine may leave a damaged file, until `sync` is called."""
    _write(file, write, wait=False)


def _write(file: Path, write: Callable[[Path], object], wait: bool) -> None:
    # Of a name of its own, since several processes may write the same file of a cache at a time.
    temporary = file.with_name(f"{file.name[:_NAME_LETTERS]}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with full_disk_explained(file):
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # as any new file's; safetensors makes its own private
            if wait:
                sync(temporary)
            temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _remove_left(file)


def _remove_left(file: Path) -> None:
    """Remove what processes left that were killed while they wrote the same file: nobody has written to it for long."""
    for left in file.parent.glob(f"{glob.escape(file.name[:_NAME_LETTERS])}.????????{TEMPORARY}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _IDLE_SECONDS:
                left.unlink()


def remove_unfinished(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote into a folder that it had for itself."""
    for left in folder.glob(f"*.????????{TEMPORARY}"):
        left.unlink(missing_ok=True)


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
    # torch says neither the file nor the cause.
    return (
        "the disk is full or cannot be written" if "PytorchStreamWriter" in said or "inline_container" in said else None
    )


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
