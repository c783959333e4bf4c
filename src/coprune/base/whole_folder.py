"""A folder that is there whole or not at all, also after a kill or a crash of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coprune.base.durable import full_disk_explained, name_durably, own_folder


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, which gets its name when the block ends well, and is removed otherwise.

    Its content is on the disk before it gets its name. What killed processes left of the same target is removed first.

    Args:
        target: one that does not exist, or is empty.

    Raises:
        CopruneError: the disk is full.
        OSError: something took the name meanwhile, or nothing can be written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with own_folder(target) as out, full_disk_explained(target):
        yield out
        _as_readable(out)
        name_durably(out, target)


def _as_readable(folder: Path) -> None:
    """Let all files be as readable as the folder is; safetensors makes its own private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
