"""Comparison of a saved folder with its source as files, without coprune and transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

WRITTEN_ANEW = {"README.md", "coprune_edits.json", "model.safetensors.index.json"}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """A tensor as stored in a file."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    def tensor(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.content), dtype=_DTYPES[self.dtype]).reshape(self.shape)


@dataclass
class Differences:
    """Differences of a saved folder from its source."""

    lost: list[str] = field(default_factory=list)
    """Tensors missing in it."""
    new: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    """Tensors with other content, each with an explanation, if there is one."""
    keys: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Paths in config.json with old and new values."""
    files: list[str] = field(default_factory=list)
    """Other files that are missing or have other content."""
    more_files: list[str] = field(default_factory=list)

    def unexplained(self) -> list[str]:
        """Describe unexplained differences, leaving configuration keys to the caller."""
        changed = [name for name, why in self.changed.items() if not why]
        kinds = {"lost": self.lost, "new": self.new, "changed": changed, "other files": self.files + self.more_files}
        return [f"{kind}: {', '.join(names[:5])} ({len(names)})" for kind, names in kinds.items() if names]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return all tensors in a folder's safetensors files, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = Stored(entry["dtype"], tuple(entry["shape"]), content[start + begin : start + end])
    return found


def differences(source: Path, saved: Path) -> Differences:
    """Compare two folders of checkpoints.

    Explanations of a changed tensor: entries became zero; it is another one of the source (after removed blocks or experts,
    later ones are renumbered); only slices of it remain.
    """
    found = Differences()
    before, after = stored_tensors(source), stored_tensors(saved)
    numbered = {(_kind(name), stored) for name, stored in before.items()}
    found.new = sorted(after.keys() - before.keys())
    for name in sorted(before):
        if name not in after:
            found.lost.append(name)
        elif after[name] != before[name]:
            moved = (_kind(name), after[name]) in numbered
            found.changed[name] = "moved" if moved else _why(before[name], after[name])
    old, new = (dict(_places(json.loads((folder / "config.json").read_text()))) for folder in (source, saved))
    found.keys = {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }
    beside, now = _files(source), _files(saved)
    found.files = sorted(name for name, content in beside.items() if now.get(name) != content)
    found.more_files = sorted(now.keys() - beside.keys())
    return found


def _kind(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _why(before: Stored, after: Stored) -> str:
    if before.dtype != after.dtype or len(before.shape) != len(after.shape):
        return ""
    old, new = before.tensor(), after.tensor()
    if old.shape == new.shape:
        return "zeros" if old.ndim >= 2 and bool(((old == new) | (new == 0)).all()) else ""
    if not all(few <= many for few, many in zip(new.shape, old.shape, strict=True)):
        return ""
    axes = [axis for axis in range(old.ndim) if old.shape[axis] != new.shape[axis]]
    if len(axes) > 1:
        return "smaller"
    slices, left = (
        [part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for part in tensor.unbind(axes[0])]
        for tensor in (old, new)
    )
    return "slices left" if all(part in slices for part in left) else "smaller"


def _places(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _places(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".safetensors" and path.name not in {*WRITTEN_ANEW, "config.json"}
    }
