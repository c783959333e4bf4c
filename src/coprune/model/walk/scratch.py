"""A file without a name for what does not fit the memory; the system removes it whatever becomes of the process."""

from __future__ import annotations

import errno
import mmap
import tempfile
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from coprune.base.errors import CopruneError
from coprune.base.words import Setting

if TYPE_CHECKING:
    from typing_extensions import Buffer


class ScratchFile:
    """Bytes in a file that is made when the first are written.

    folder: where (default: the folder for temporary files). Raises CopruneError if the disk is full.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._end = 0

    @property
    def size(self) -> int:
        """Bytes that were handed out."""
        return self._end

    def extend(self, nbytes: int) -> int:
        """First byte of a new piece of the file, at a multiple of the system's pages, where a mapping may begin."""
        start = self._end
        self._end += -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return start

    def write(self, start: int, raw: Buffer) -> None:
        """Write bytes there."""
        rest = memoryview(raw)
        try:
            file = self._opened()
            file.seek(start)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            folder, keep = self._folder or tempfile.gettempdir(), Setting("activation_memory")
            raise CopruneError(
                f"the disk is full: the calibration activations do not fit {folder}",
                fix=("free some space, use fewer samples, or keep more of them in memory with ", keep),
            ) from error

    def read_into(self, start: int, raw: Buffer) -> None:
        """Fill a buffer with what was written there."""
        file: Any = self._opened()
        file.seek(start)
        rest = memoryview(raw)
        while rest:
            rest = rest[file.readinto(rest) :]

    def map(self, start: int, nbytes: int) -> mmap.mmap:
        """A private mapping of what was written there: what is done to it in place does not reach the file."""
        return mmap.mmap(self._opened().fileno(), nbytes, access=mmap.ACCESS_COPY, offset=start)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._file = _nameless(self._folder)
            weakref.finalize(self, self._file.close)
        return self._file


def _nameless(folder: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="coprune-activations-", dir=folder, buffering=0)
