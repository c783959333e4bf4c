"""The compiled library on disk, loaded only if it is complete and nobody else could have written it.

Its folder, and every folder above, must belong to this user or to root, and nobody else may write there (or only beside,
as in /tmp); otherwise the library is compiled for this process alone. A checksum detects a truncated file.
"""

from __future__ import annotations

import grp
import hashlib
import logging
import os
import pwd
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from coprune.base.files import sync, write_durably

LIBRARY = "kernels.so"
_CHECKSUM = "kernels.sha256"

logger = logging.getLogger(__name__)


@contextmanager
def library_in(folder: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Yield the library of a folder while it is loaded.

    make: compiles it to a path; called if the folder has no complete library or, if the folder cannot store one, for a
    private folder that is removed afterwards. Raises the errors of `make`, and OSError if there is no private folder
    either.
    """
    kept = _kept(folder, make)
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="coprune-") as private:
        if not only_ours(Path(private)):
            raise PermissionError(f"others can write to {tempfile.gettempdir()}")
        make(Path(private) / LIBRARY)
        yield Path(private) / LIBRARY


def only_ours(path: Path) -> bool:
    """Return whether only this user and root can change a path and all folders above it."""
    lexical, real = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    chain = {lexical, real, *lexical.parents, *real.parents}
    try:
        return all(_ours(place.lstat(), place not in (lexical, real)) for place in chain)
    except OSError:
        return False


def _ours(found: os.stat_result, above: bool) -> bool:
    if found.st_uid not in (0, os.geteuid()):
        return False
    if stat.S_ISLNK(found.st_mode):
        return True  # a link's own mode means nothing; its folder decides who may replace it
    others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _private_group(found.st_gid))
    # In a sticky folder nobody can rename or remove another user's files.
    return not others or (above and bool(found.st_mode & stat.S_ISVTX))


def _private_group(group: int) -> bool:
    """Return whether a group has this user as its only member, as many systems create one per user."""
    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}


def _kept(folder: Path, make: Callable[[Path], object]) -> Path | None:
    """Return the folder's complete library, built if needed; None if it cannot be stored there."""
    library = folder / LIBRARY
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not only_ours(folder):
            logger.warning("other users can write to %s, so the kernels are compiled again at every start", folder)
            return None
        if not _is_whole(library):
            with FileLock(folder / "kernels.lock"):
                if not _is_whole(library):
                    _make_whole(library, make)
    except OSError as error:
        logger.warning("the kernels are compiled again at every start: %s", error)
        return None
    return library


def _make_whole(library: Path, make: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / LIBRARY
        make(made)
        made.chmod(0o700)
        sync(made)
        checksum = hashlib.sha256(made.read_bytes()).hexdigest()
        made.replace(library)
    write_durably(library.with_name(_CHECKSUM), lambda temporary: temporary.write_text(checksum))


def _is_whole(library: Path) -> bool:
    try:
        noted = library.with_name(_CHECKSUM).read_text(encoding="ascii")
        return only_ours(library) and hashlib.sha256(library.read_bytes()).hexdigest() == noted
    except (OSError, ValueError):
        return False
