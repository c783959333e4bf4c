"""Size, digest and copies of a model's file or folder."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from coprune.base.files import whole_folder, write_durably
from coprune.model.checkpoint.digest import bytes_of_weights
from coprune.model.checkpoint.gguf_header import gguf_parts
from coprune.model.checkpoint.locate import GgufFile, Location


def bytes_given(source: Location) -> int:
    """Return the bytes of a model's GGUF file with all its parts, or of its folder's weights."""
    parts = [source.path] if source.path.is_dir() else gguf_parts(source.path)
    return sum(map(bytes_of_weights, parts))


def is_file_of(source: Location, runtime: str) -> bool:
    """Return whether a runtime can load a model's own file or folder unchanged."""
    if isinstance(source, GgufFile):
        return runtime == "llama.cpp" and len(gguf_parts(source.path)) == 1
    return runtime == "transformers"


def digest_of(made: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's weights."""
    digest = hashlib.sha256()
    for file in sorted(made.glob("*.safetensors")) if made.is_dir() else [made]:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def copy(source: Path, target: Path) -> None:
    """Copy a file or folder atomically, replacing an earlier one."""
    if not source.is_dir():
        write_durably(target, lambda path: shutil.copyfile(source, path))
        return
    shutil.rmtree(target, ignore_errors=True)
    with whole_folder(target) as out:
        shutil.copytree(source, out, dirs_exist_ok=True)
