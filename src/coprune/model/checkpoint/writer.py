"""Write a checkpoint folder part by part and rename it when it is complete.

Everything goes into a hidden folder beside the final one. Each part (a block, or the rest of the model) is a safetensors file
with a note of its checksum and the caller's data, so that a resumed run knows which parts are complete. Disk writes and
checksums run in the background. In the end the parts become the checkpoint's shards or, if small, are joined to one file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from coprune.base.errors import BadInput, VerificationError
from coprune.base.files import (
    full_disk_explained,
    is_unfinished,
    name_durably,
    own_folder,
    remove_left_beside,
    remove_unfinished,
    require_own_name,
    sync,
    write_durably,
    write_text,
    write_whole,
)
from coprune.base.reading import on_its_way
from coprune.model.checkpoint.encoding import Place, keep_place
from coprune.model.checkpoint.names import EDITS_FILE
from coprune.model.checkpoint.shards import INDEX_FILE, SINGLE_FILE, TensorEntry, read_entries
from coprune.store.claim import Claim, Taken

REST = "rest"
"""Name of the part with the tensors outside the blocks."""
SHARED = "shared"
"""Name of an extra part that only a resumed run reads; it does not become part of the checkpoint."""
_LOCK = "running.lock"
_MANIFEST = "parts.json"
_REFUSED = "refused"
"""Marks a complete checkpoint that failed verification when it was reloaded."""
SINGLE_FILE_BYTES = 5_000_000_000  # the usual size of a shard


class CheckpointWriter:
    """Writes one checkpoint folder. `parts` are the names of the parts in the order of the shards."""

    def __init__(self, folder: Path, parts: Sequence[str], total_bytes: int) -> None:
        """Open a checkpoint for writing, or resume an earlier one for the same folder.

        total_bytes: size of all tensors, to check the free disk space. Raises BadInput if the folder is not empty, if the
        unfinished one was made for other parts or is in use by another process, or if the disk is too full.
        """
        self.folder = folder
        self.partial = folder.with_name(f".{folder.name}.partial")
        self._parts = list(parts)
        self._joined = total_bytes <= SINGLE_FILE_BYTES
        self._beside = ThreadPoolExecutor(max_workers=1)
        self._unsettled: tuple[Future[None], Callable[[], None] | None] | None = None
        refuse_occupied(folder)
        self._require_space(total_bytes)
        self._claim()

    def _claim(self) -> None:
        """Create the unfinished folder, or take over one with the same parts."""
        manifest = self.partial / _MANIFEST
        remove_left_beside(self.partial)
        if os.path.lexists(self.partial) and not _is_unfinished_checkpoint(self.partial):
            raise BadInput(
                f"{self.partial} is in the way: it is not the unfinished checkpoint of a run",
                fix="move it to another place, or choose another name for the model",
            )
        if self.partial.is_dir():
            self._lock()
        if not manifest.is_file():
            self.discard()
            self.partial.mkdir(parents=True)
            self._lock()
            write_text(manifest, json.dumps(self._parts))
        elif read_json_list(manifest) != self._parts and not self.holds_work:
            self.discard()
            self._claim()
        elif read_json_list(manifest) != self._parts:
            raise BadInput(
                f"{self.partial} holds the unfinished checkpoint of another model",
                fix="finish that run, remove the folder, or choose another name",
            )
        remove_unfinished(self.partial)

    def _lock(self) -> None:
        """Lock the unfinished folder until this process ends, however it ends."""
        try:
            self._claimed = Claim(self.partial / _LOCK)
        except Taken:
            raise BadInput(
                f"another run is writing {self.folder}", fix="wait until it finishes, or choose another name"
            ) from None

    def _require_space(self, total_bytes: int) -> None:
        # Joining needs space for the parts and the joined file at once.
        needed = total_bytes * (2 if self._joined else 1)
        if self.partial.is_dir():
            needed -= sum(self.file(part).stat().st_size for part in self._parts if self.file(part).is_file())
        existing = next(parent for parent in self.partial.resolve().parents if parent.is_dir())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise BadInput(
                f"writing {self.folder} takes {needed:,} bytes, but its disk has {free:,} free",
                fix="free some space or choose another disk",
            )

    def file(self, part: str) -> Path:
        """Return a part's file. Raises ValueError for an unknown part."""
        if part == SHARED:
            return self.partial / f"{SHARED}.safetensors"
        return self.partial / f"model-{self._parts.index(part) + 1:05d}-of-{len(self._parts):05d}.safetensors"

    def _note(self, part: str) -> Path:
        return self.file(part).with_suffix(".json")

    def write(
        self,
        part: str,
        tensors: Mapping[str, Tensor],
        remember: Mapping[str, Any] | None = None,
        beside: bool = False,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a part; it is on disk before the next one is written.

        Args:
            part: its name.
            tensors: its content.
            remember: JSON values for `recall` to return.
            beside: whether to write in the background.
            ready: called once the part can be read from its file: before returning, or in the background when settled.

        Raises:
            CopruneError: the disk is full.
        """
        self.settle()
        self._note(part).unlink(missing_ok=True)
        # Tensors of a device are copied into pinned memory by the background writer.
        own = {name: tensor.detach() for name, tensor in tensors.items()}
        coming: dict[str, Callable[[], Tensor]] = {
            name: on_its_way(tensor) if beside else tensor.cpu for name, tensor in own.items()
        }

        def store() -> None:
            whole = apart({name: arrive().contiguous() for name, arrive in coming.items()})
            write_whole(self.file(part), lambda temporary: save_file(whole, temporary, metadata={"format": "pt"}))

        def secure() -> None:
            """Wait until the part is on disk, and only then record it as complete."""
            if beside:
                store()
            file = self.file(part)
            with full_disk_explained(file):
                sync(file)
                sync(file.parent)
                size, checksum = file.stat().st_size, _sha256(file)
                content = {"part": part, "bytes": size, "sha256": checksum, "remember": dict(remember or {})}
                write_text(self._note(part), json.dumps(content))

        if not beside:
            store()
        self._unsettled = self._beside.submit(secure), ready if beside else None
        if not beside:
            ready()

    def settle(self) -> None:
        """Wait until the last part is on disk and readable. Raises the background write's error."""
        unsettled, self._unsettled = self._unsettled, None
        if unsettled is not None:
            written, ready = unsettled
            written.result()
            if ready is not None:
                ready()

    @property
    def holds_work(self) -> bool:
        """Whether there are parts that another run may resume from."""
        notes = self.partial.glob("model-*-of-*.json")
        return any(True for _ in notes) and not (self.partial / _REFUSED).is_file()

    def recall(self, part: str) -> dict[str, Any] | None:
        """Return the notes of a complete part; None if it has to be written."""
        self.settle()
        try:
            note = json.loads(self._note(part).read_text(encoding="utf-8"))
            file = self.file(part)
            same = note["part"] == part and note["bytes"] == file.stat().st_size and note["sha256"] == _sha256(file)
            remembered: dict[str, Any] = note["remember"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return remembered if same else None

    def finish(
        self,
        scaffolding: Sequence[str] = (),
        check: Callable[[Path], object] = lambda folder: None,
        place: Place = keep_place,
    ) -> Path:
        """Complete the checkpoint and give it its final name; config and tokenizer must already be in `partial`.

        Args:
            scaffolding: names of the caller's own files in `partial`, which are removed.
            check: called with the complete checkpoint before it is renamed; an exception prevents that.
            place: the new name of every tensor, None to leave it out.

        Returns:
            The folder under its final name.

        Raises:
            BadInput: the final name was taken in the meantime.
            ValueError: a part is missing.
        """
        self.settle()
        missing = [part for part in self._parts if not self._note(part).is_file()]
        if missing:
            raise ValueError(f"parts were not written: {', '.join(missing)}")
        refuse_occupied(self.folder)
        parts = [self.file(part) for part in self._parts]
        if self._joined:
            files = [self.partial / SINGLE_FILE]
            write_durably(files[0], lambda temporary: join_files(parts, temporary, place))
        else:
            files = [file for part in parts if (file := self._final(part, place)) is not None]
            self._write_index(files)
        try:
            check(self.partial)
        except VerificationError:
            write_text(self.partial / _REFUSED, "")
            raise
        # From last to first, so that a run killed here can resume after the remaining parts.
        for part in reversed(self._parts):
            self._note(part).unlink()
            if self.file(part) not in files:
                self.file(part).unlink()
        own = [path.name for path in (self._note(SHARED), self.file(SHARED))]
        for name in (_REFUSED, *own, *scaffolding, _MANIFEST, _LOCK):
            (self.partial / name).unlink(missing_ok=True)
        name_durably(self.partial, self.folder)
        return self.folder

    def _final(self, part: Path, place: Place) -> Path | None:
        """Return the shard of a part: the same file if unchanged, None if nothing is left of it.

        A part that changes is kept until the end, since a run killed before then resumes from it.
        """
        placed = placed_entries([part], place)
        if not placed:
            return None
        if placed.keys() == read_entries(part).keys():
            return part
        file = part.with_name(part.name.replace("model-", "dense-", 1))
        write_durably(file, lambda temporary: join_files([part], temporary, place))
        return file

    def _write_index(self, files: Sequence[Path]) -> None:
        entries: dict[str, TensorEntry] = {}
        for file in files:
            entries |= read_entries(file)
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(entry.shape) for entry in entries.values()),
                "total_size": sum(entry.nbytes for entry in entries.values()),
            },
            "weight_map": {name: entry.file.name for name, entry in entries.items()},
        }
        write_text(self.partial / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def discard(self) -> None:
        """Remove everything that has been written."""
        if self._unsettled is not None:
            self._unsettled[0].exception()  # a failed write does not matter any more
            self._unsettled = None
        if self.partial.exists():
            with own_folder(self.partial) as gone:  # at once, so that a kill leaves no partial folder under its name
                self.partial.replace(gone / self.partial.name)


def discard_unfinished(folder: Path) -> None:
    """Remove a killed run's unfinished checkpoint. folder: its final name."""
    partial = folder.with_name(f".{folder.name}.partial")
    if _is_unfinished_checkpoint(partial):
        shutil.rmtree(partial)


def _is_unfinished_checkpoint(folder: Path) -> bool:
    """Return whether a folder was left by an interrupted run, at any stage; at the last it is already a complete model."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir() if not is_unfinished(path)}
    return _MANIFEST in names or names <= {_LOCK} or EDITS_FILE in names


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


COPY_BYTES = 1 << 24


def placed_entries(files: Sequence[Path], place: Callable[[str], str | None] = str) -> dict[str, TensorEntry]:
    """Return the tensors of several safetensors files by their new names. place: returns None to leave one out."""
    found: dict[str, TensorEntry] = {}
    for file in files:
        names = ((place(name), entry) for name, entry in read_entries(file).items())
        found |= {name: entry for name, entry in names if name is not None}
    return found


def join_files(files: Sequence[Path], joined: Path, place: Callable[[str], str | None] = str) -> None:
    """Join safetensors files to one, copying bytes with little memory.

    place: the new name of a tensor, None to leave it out.
    """
    entries = placed_entries(files, place)
    # The safetensors library's order: wide dtypes first, so that every tensor is aligned.
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
            # Opened per tensor, since there may be more blocks than a process may have open files.
            with entries[name].file.open("rb") as source:
                source.seek(entries[name].start)
                for start in range(0, entries[name].nbytes, COPY_BYTES):
                    target.write(source.read(min(COPY_BYTES, entries[name].nbytes - start)))


def _item_bytes(entry: TensorEntry) -> int:
    return entry.nbytes // max(math.prod(entry.shape), 1)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, such as tied ones, which some checkpoints hold under both names."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return found


def refuse_occupied(folder: Path) -> None:
    """Raise BadInput if an output folder is not empty or its name cannot be used."""
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
