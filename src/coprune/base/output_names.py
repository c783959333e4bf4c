"""Names of folders that are to be written: what is wrong with one is said before anything slow starts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from coprune.base.errors import BadInput
from coprune.base.words import Setting

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


def require_file(path: Path | None, field: str | None = None) -> None:
    """The same for a file that a command is asked to write at its end; its folder is made if need be.

    Args:
        path: of the file; None where none is asked for.
        field: the setting that names it.
    """
    if path is None:
        return
    require_usable(path, field)
    if path.is_dir():
        raise BadInput(f"{path} is a folder", field=field, value=path, fix="name a file")


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
        _try_to_write(path if path.is_dir() else above)
    except OSError as error:
        return f"cannot be a folder: {error.strerror}"
    return None


def _try_to_write(folder: Path) -> None:
    """Raise OSError where no file can be made in a folder, which permissions alone do not tell (of /proc, for instance)."""
    if not folder.is_dir():
        return
    with tempfile.TemporaryFile(dir=folder):
        pass


def require_own_name(path: Path, field: str | None = None) -> None:
    """The same for a folder that gets its name when it is whole, which a link cannot give it."""
    require_usable(path, field)
    if path.is_symlink():
        raise BadInput(f"{path} is a link", field=field, value=path, fix="name the folder that it leads to")


def require_apart(run: Path, model: Path, own: Iterable[str] = ()) -> None:
    """Raise BadInput where the folder of a model would hold the run's, or be in what the run keeps for itself.

    Args:
        run: folder of the run.
        model: folder that the model gets once it is whole.
        own: folders in the run's that no model may be in.
    """
    fix = ("name another folder with ", Setting("save_model"), ", or one for the run with ", Setting("save"))
    here, there = run.resolve(), model.resolve()  # by whatever way they are named
    if here.is_relative_to(there):
        inside = f"the run folder {run} would be in {model}, which becomes the model's"
        raise BadInput(inside, field="save_model", value=model, fix=fix)
    if any(there.is_relative_to(here / name) for name in own):
        inside = f"{model} would be in what the run keeps for itself"
        raise BadInput(inside, field="save_model", value=model, fix=fix)
