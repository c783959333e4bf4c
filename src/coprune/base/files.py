"""Atomic, durable writes of files and folders, and checks of paths."""

from __future__ import annotations

import difflib
import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from coprune.base.errors import BadInput, CopruneError
from coprune.base.words import Setting


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises like `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it once it is on disk; create its folder if needed.

    Raises CopruneError if the disk is full, BadInput if the folder cannot be written to; nothing is left behind then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error


def open_given(path: Path) -> BinaryIO:
    """Open a file given by the user for reading bytes.

    Raises BadInput for a pipe or a device, which could block forever; OSError like `open`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise BadInput(f"{path} is a pipe or a device", value=path, fix="save its output to a file and name that file")


def read_given(path: Path) -> str:
    """Read a UTF-8 file given by the user. Raises like `open_given`, and UnicodeDecodeError."""
    with open_given(path) as stream:
        return stream.read().decode("utf-8")


def require_regular(folder: Path) -> None:
    """Raise BadInput if a folder contains pipes or devices, which could block a library that reads it."""
    for entry in folder.iterdir():
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise BadInput(f"{entry} is a pipe or a device", value=folder, fix="remove it")


def like_named(path: Path, least: float = 0.6) -> Path | None:
    """Return the entry beside a missing path whose name is most similar, or None.

    least: minimum similarity, from 0 to 1.
    """
    if not path.parent.is_dir():
        return None
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=least)
    return path.parent / near[0] if near else None


_NAME_BYTES = 200  # of a name, which has 255 at most
_MARK = "coprune"
_OWN = re.compile(rf"\..+\.{_MARK}-[0-9a-f]{{8}}")
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is exceeded",
}


def write_durably(file: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path, and rename the result to `file` once it is on disk.

    The path is in a separate folder next to `file`, which also holds temporary files of the writing library.
    Raises CopruneError if the disk is full; nothing is left on any error.
    """
    _write(file, write, wait=True)
    sync(file.parent)


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write like `write_durably` without waiting for the disk: a machine crash may leave a damaged file until `sync`."""
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
    """Yield a hidden folder next to a target for this process only, and remove it at the end.

    Leftovers of killed processes next to the same target are removed first; a lock, which ends with its process, distinguishes
    them from folders in use.
    """
    remove_left_beside(target)
    folder, lock = _begin(target.with_name(_start_of_name(target)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _begin(start: Path) -> tuple[Path, int]:
    """Make and lock a folder with this prefix."""
    while True:
        folder = start.with_name(f"{start.name}{secrets.token_hex(4)}")
        folder.mkdir()
        with suppress(FileNotFoundError):  # another process took it for a leftover
            lock = os.open(folder, os.O_RDONLY)
            if _locks(lock) is not False and folder.is_dir():
                return folder, lock
            os.close(lock)


def is_unfinished(path: Path) -> bool:
    """Return whether a path has the name of a temporary file, in use or left by a killed process."""
    return _OWN.fullmatch(path.name) is not None


def _start_of_name(target: Path) -> str:
    return f".{os.fsencode(target.name)[:_NAME_BYTES].decode(errors='ignore')}.{_MARK}-"


def remove_left_beside(target: Path) -> None:
    """Remove the leftovers of killed processes next to a target."""
    _remove_left(target.parent, f"{glob.escape(_start_of_name(target))}*")


def remove_unfinished(folder: Path) -> None:
    """Remove the leftovers of killed processes in a folder."""
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
    """Take a lock; return False if it is held, None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def full_disk_explained(file: Path) -> Iterator[None]:
    """Raise CopruneError if the disk is full or a file exceeds a size limit."""
    try:
        yield
    except Exception as error:
        cause = _why_not_written(error)
        if cause is None:
            raise
        raise CopruneError(
            f"{cause}: {file} could not be written", fix="free some space and repeat the command"
        ) from error


def _why_not_written(error: Exception) -> str | None:
    """Return the disk problem behind a write error, or None if the cause is another."""
    number, said = getattr(error, "errno", None), str(error)
    for code, cause in _FULL.items():
        if number == code or os.strerror(code) in said:  # safetensors wraps the system's message
            return cause
    # torch and numpy name neither the file nor the cause.
    silent = ("PytorchStreamWriter", "inline_container", " requested and ")
    return "the disk is full or cannot be written" if any(words in said for words in silent) else None


def name_durably(partial: Path, folder: Path) -> None:
    """Rename a finished folder once all its files are on disk.

    Raises OSError, rather than overwrites, if the target exists.
    """
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    partial.replace(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside the target, renamed to it on success and removed otherwise.

    Its content is on disk before the rename. Leftovers of killed processes for the same target are removed first.

    Args:
        target: one that does not exist, or is empty.

    Raises:
        CopruneError: the disk is full.
        OSError: the name was taken meanwhile, or the place is not writable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with own_folder(target) as out, full_disk_explained(target):
        yield out
        _as_readable(out)
        name_durably(out, target)


def _as_readable(folder: Path) -> None:
    """Give all files the folder's read permissions; safetensors makes its own private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


_MOST_LETTERS = 80
_OF_A_VALUE = 30
_BESIDES = ("given", "not given")  # of settings whose presence alone matters


def folder_apart(
    folder: Path, settings: Mapping[str, Any], settings_in: Callable[[Path], Mapping[str, Any] | None]
) -> tuple[Path, list[str]]:
    """Return a folder for a run: the default, unless it holds a run with other settings.

    Args:
        folder: the default folder.
        settings: the settings that decide the run.
        settings_in: returns those of the run in a folder; None if there is none, and different ones if unknown.

    Returns:
        The folder, which may hold an earlier run with the same settings; and the names of the settings in which the run
        in the default folder differs.
    """
    there = settings_in(folder)
    differing = [] if there is None else _differing(settings, there)
    if not differing:
        return folder, []
    # Settings whose presence alone matters are only named if nothing else differs.
    telling = [name for name in differing if settings[name] not in _BESIDES] or differing
    stem = f"{folder.name}-{_short('-'.join(_word(name, settings[name]) for name in telling))}"
    for number in count(1):
        own = folder.with_name(stem if number == 1 else f"{stem}-{number}")
        there = settings_in(own)
        if there is None or not _differing(settings, there):
            return own, differing
    raise AssertionError("numbers do not end")


def _differing(settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    return [name for name in settings if settings[name] != others.get(name)]


def _word(name: str, value: Any) -> str:
    """Return a setting with its value as part of a folder's name."""
    word = name.replace("_", "-")
    if value is True or value == _BESIDES[0]:
        return word
    if value is None or value is False or value in ((), [], "", _BESIDES[1]):
        return f"no-{word}"
    values = value if isinstance(value, list | tuple) else [value]
    said = "-".join("-".join(Path(str(one)).parts[-2:]) for one in values)
    return f"{word}-{re.sub(r'[^a-zA-Z0-9.=+]+', '-', said).strip('-')[:_OF_A_VALUE]}"


def _short(words: str) -> str:
    if len(words) <= _MOST_LETTERS:
        return words
    return f"{words[: _MOST_LETTERS - 9]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


_MOST_BYTES = 255  # of a name, on all usual file systems
_LONGER = 20  # extra characters of a folder's temporary name


def require_usable(path: Path, field: str | None = None) -> None:
    """Raise BadInput if a folder cannot have this name: invalid, too long, below a file, or not writable.

    Args:
        path: of a folder, which need not exist.
        field: the setting that names it.
    """
    why = _obstacle(path)
    if why is not None:
        raise BadInput(f"{str(path)[:300]!r} {why}", field=field, value=path, fix="choose another name")


def require_file(path: Path | None, field: str | None = None) -> None:
    """Require that a file can be written at the end of a command; its folder is created if needed.

    Args:
        path: of the file; None if not requested.
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
        return "is not valid text"
    if "\0" in str(path):
        return "contains a null byte"
    if not path.name or max(parts) > _MOST_BYTES or parts[-1] > _MOST_BYTES - _LONGER:
        return "is too long for a name" if path.name else "is not a folder name"
    try:
        if path.is_symlink() and not path.exists():
            return "is a broken link"
        above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not above.is_dir():
            return f"is below {above}, which is not a folder"
        if not os.access(above, os.W_OK | os.X_OK):
            return f"is in {above}, which is not writable"
        _try_to_write(path if path.is_dir() else above)
    except OSError as error:
        return f"cannot be a folder: {error.strerror}"
    return None


def _try_to_write(folder: Path) -> None:
    """Raise OSError if no file can be created in a folder; permissions alone do not show that (in /proc, for instance)."""
    if not folder.is_dir():
        return
    with tempfile.TemporaryFile(dir=folder):
        pass


def require_own_name(path: Path, field: str | None = None) -> None:
    """Require that a finished folder can be renamed into place, which a link prevents."""
    require_usable(path, field)
    if path.is_symlink():
        raise BadInput(f"{path} is a link", field=field, value=path, fix="name the folder that it leads to")


def require_apart(run: Path, model: Path, own: Iterable[str] = ()) -> None:
    """Raise BadInput if the model's folder would contain the run's, or be in the run's internal folders.

    Args:
        run: folder of the run.
        model: final folder of the model.
        own: internal folders of the run that may not contain a model.
    """
    fix = ("name another folder with ", Setting("save_model"), ", or one for the run with ", Setting("save"))
    here, there = run.resolve(), model.resolve()  # resolved, since the same folder has many names
    if here.is_relative_to(there):
        inside = f"the run folder {run} would be inside {model}, which will be the model's"
        raise BadInput(inside, field="save_model", value=model, fix=fix)
    if any(there.is_relative_to(here / name) for name in own):
        inside = f"{model} would be inside the run's internal folders"
        raise BadInput(inside, field="save_model", value=model, fix=fix)


def digest_of_files(files: Iterable[Path], named: bool = True) -> str:
    """Return the digest of files' contents, with or without their names, in the order given; 32 hexadecimal digits."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            own = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.name if named else ''} {own}\n".encode())
    return whole.hexdigest()[:32]
