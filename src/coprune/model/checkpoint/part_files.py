"""What a checkpoint's writer does with the files of its parts, and what it refuses to write over."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.output_names import require_own_name
from coprune.model.checkpoint.encoding import DENSE, Encoding, Place
from coprune.model.checkpoint.shards import TensorEntry, read_entries, read_tensor

COPY_BYTES = 1 << 24


def placed_entries(files: Sequence[Path], place: Callable[[str], str | None] = str) -> dict[str, TensorEntry]:
    """The tensors of several safetensors files by the names that they get. place: None for those that are left out."""
    found: dict[str, TensorEntry] = {}
    for file in files:
        names = ((place(name), entry) for name, entry in read_entries(file).items())
        found |= {name: entry for name, entry in names if name is not None}
    return found


def join_files(files: Sequence[Path], joined: Path, place: Callable[[str], str | None] = str) -> None:
    """Write the tensors of several safetensors files into one, byte by byte, in little memory.

    place: the name that a tensor gets, None if it is left out.
    """
    entries = placed_entries(files, place)
    # The order that the safetensors library writes: wide dtypes first, so that every tensor is aligned.
    order = sorted(entries, key=lambda name: (-_item_bytes(entries[name]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        entry = entries[name]
        offsets = [position, position + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with joined.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            # Opened for every tensor: there may be more blocks than a process may have files open.
            with entries[name].file.open("rb") as source:
                source.seek(entries[name].start)
                for start in range(0, entries[name].nbytes, COPY_BYTES):
                    target.write(source.read(min(COPY_BYTES, entries[name].nbytes - start)))


def _item_bytes(entry: TensorEntry) -> int:
    return entry.nbytes // max(math.prod(entry.shape), 1)


def copy_tensors(files: Sequence[Path], target: Path, place: Place, encoding: Encoding) -> None:
    """Write the tensors of several dense files into one, stored as the encoding does; one is in memory at a time."""
    if encoding is DENSE:
        join_files(files, target, place)
        return
    entries = placed_entries(files, place)
    encoding.write(target, list(entries), ((name, read_tensor(entry)) for name, entry in entries.items()))


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, no two in one memory, as tied ones are: some checkpoints hold them under both names."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return found


def refuse_occupied(folder: Path) -> None:
    """Raise BadInput if a folder that is to be written already holds something, or cannot get its name."""
    require_own_name(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise BadInput(f"{folder} already exists", fix="remove it or choose another name. Nothing was overwritten")


def read_json_list(file: Path) -> list[Any] | None:
    """Read a JSON list; None if the file is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, list) else None
