"""Large files that are there whole or not at all, also after a crash of the machine."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from coprune.base.errors import CopruneError


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
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with full_disk_explained(file):
            write(temporary)
            if wait:
                sync(temporary)
            temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def full_disk_explained(file: Path) -> Iterator[None]:
    """Raise CopruneError where the disk is full."""
    try:
        yield
    except Exception as error:
        # safetensors reports a full disk in words of its own.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CopruneError(
                f"the disk is full: {file} could not be written", fix="free some space and go on"
            ) from error
        raise


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
