"""Which files of a model's folder are its own, and so may be copied to another one.

A folder that came from somebody else can hold links to any file of this machine (`notes.txt -> ~/.ssh/id_rsa`), whose
content would be copied, and perhaps pushed. So a link counts only if it stays inside the folder, or leads where the
Hub's cache keeps what its folders link to.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

logger = logging.getLogger(__name__)


def own_files(folder: Path, below: bool = False) -> list[Path]:
    """The regular files of a folder by name, less links that lead out of it, which are logged.

    below: those of its subfolders too; a link to a folder is never followed.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        if not below:
            folders.clear()
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for path in sorted(Path(place) / name for name in [*names, *links]):
            if is_own(path, folder):
                found += [path] if path.is_file() else []
            else:
                logger.warning("%s is left out: it is a link to something outside of the model's folder", path)
    return sorted(found)


def is_own(path: Path, folder: Path) -> bool:
    """Whether a path is in a folder, through links or not, or in what the Hub's cache keeps for it."""
    # Not Path.resolve, which raises where links go round in a circle.
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return True
    # models--owner--name/snapshots/REVISION/config.json -> ../../blobs/HASH
    if home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs":
        return True
    cache = Path(os.path.realpath(HF_HUB_CACHE))
    return real.is_relative_to(cache) and real.relative_to(cache).parts[1:2] == ("blobs",)
