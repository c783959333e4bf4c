"""Names of folders that are to be written: what is wrong with one is said before anything slow starts."""

from __future__ import annotations

import os
from pathlib import Path

from coprune.base.errors import BadInput

_MOST_BYTES = 255  # of a name, on all usual file systems
_LONGER = 20  # so much longer is the name that a folder has while it is written


def require_usable(path: Path, field: str | None = None) -> None:
    """Raise BadInput where a folder cannot get this name: it is none, too long, in a file, or where nobody may write.

    Args:
        path: of a folder, which need not exist.
        field: the setting that names it.
    """
    why = _obstacle(path)
    if why is not None:
        raise BadInput(f"{str(path)[:300]!r} {why}", field=field, value=path, fix="choose another name")


def _obstacle(path: Path) -> str | None:
    try:
        parts = [len(os.fsencode(part)) for part in path.parts]
    except UnicodeEncodeError:
        return "holds what is no text"
    if "\0" in str(path):
        return "holds a zero byte"
    if not path.name or max(parts) > _MOST_BYTES or parts[-1] > _MOST_BYTES - _LONGER:
        return "is too long for a name" if path.name else "is no name of a folder"
    try:
        if path.is_symlink() and not path.exists():
            return "is a link that leads nowhere"
        above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not above.is_dir():
            return f"is below {above}, which is no folder"
        if not os.access(above, os.W_OK | os.X_OK):
            return f"is in {above}, where this user may not write"
    except OSError as error:
        return f"cannot be a folder: {error.strerror}"
    return None


def require_own_name(path: Path, field: str | None = None) -> None:
    """The same for a folder that gets its name when it is whole, which a link cannot give it."""
    require_usable(path, field)
    if path.is_symlink():
        raise BadInput(f"{path} is a link", field=field, value=path, fix="name the folder that it leads to")
