"""Write a GGUF file from parts of another one: each tensor whole, or some entries of its first axis, as stored.

Rows, experts and tokens are entries of a tensor's outermost axis, so their bytes are contiguous in every type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from coprune.base.errors import BadInput, VerificationError
from coprune.base.files import write_durably
from coprune.base.progress import Reporter
from coprune.gguf_files.metadata import Field, Fields, architecture, read_fields, write_fields
from coprune.model.checkpoint.locate import GgufFile
from coprune.model.checkpoint.mapped_gguf import MappedGguf

_BY_WRITER = ("GGUF.", "general.architecture", "split.")


@dataclass(frozen=True)
class Slice:
    """The part of a tensor that a new file copies."""

    name: str
    """Name in the new file."""
    kept: NDArray[np.int64] | None = None
    """Indices of its first axis; None for all."""

    def pieces(self, stored: Any) -> Iterator[Any]:
        """Yield the stored bytes of a tensor's remaining entries, as views of a few MiB, without copying."""
        entries = len(stored.data)
        kept = np.arange(entries) if self.kept is None else self.kept
        most = max(1, _PIECE * entries // max(1, int(stored.n_bytes)))
        for run in np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1):
            for start in range(0, len(run), most):
                first = int(run[start])
                yield stored.data[first : first + len(run[start : start + most])]

    def bytes_of(self, stored: Any) -> int:
        """Return the number of remaining bytes of a tensor."""
        whole = int(stored.n_bytes)
        return whole if self.kept is None else whole // len(stored.data) * len(self.kept)


_PIECE = 1 << 24


@dataclass(frozen=True)
class _Left:
    """The remaining part of a tensor, with the interface that the gguf package's writer needs."""

    nbytes: int
    pieces: Iterator[Any]
    advance: Callable[[float], None]

    def tofile(self, file: BinaryIO) -> None:
        """Write the part piece by piece."""
        for piece in self.pieces:
            piece.tofile(file)
            self.advance(piece.nbytes)


Slices = Mapping[str, Slice]
"""Slices by the names of the source's tensors, in its order; tensors without one are left out."""


class Sliced:
    """A GGUF file to cut others from."""

    def __init__(self, file: GgufFile) -> None:
        """Read everything except the tensors' values. Raises BadInput if the file or a part of it cannot be read."""
        self.file = file
        self._mapped = MappedGguf(file)
        self.tensors = self._mapped.tensors
        self.fields: Mapping[str, Field] = read_fields(self._mapped.first, _BY_WRITER)

    @property
    def arch(self) -> str:
        """Prefix of the keys that describe the model."""
        return architecture(self._mapped.first)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(int(stored.n_elements) for stored in self.tensors)

    def sizes(self, slices: Slices) -> tuple[int, int]:
        """Return the bytes of all tensors before and after a cut."""
        left = sum(slices[stored.name].bytes_of(stored) for stored in self.tensors if stored.name in slices)
        return sum(int(stored.n_bytes) for stored in self.tensors), left

    def write(self, target: Path, slices: Slices, fields: Fields, reporter: Reporter) -> None:
        """Write a file with the slices, completely or not at all.

        Args:
            target: its path.
            slices: the parts of the tensors to keep.
            fields: its metadata.
            reporter: shows the progress.

        Raises:
            BadInput: the target exists.
            VerificationError: the written bytes differ from the source's.
        """
        if target.exists():
            raise BadInput(f"{target} already exists", field="save_model", value=target, fix="choose another name")

        def write(file: Path) -> None:
            with reporter.bar("Writing", self.sizes(slices)[1]) as advance:
                self._write(file, slices, fields, advance)
            self._verify(file, slices)

        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, write)

    def _write(self, file: Path, slices: Slices, fields: Fields, advance: Callable[[float], None]) -> None:
        from gguf import GGUFWriter

        left = [stored for stored in self.tensors if stored.name in slices]
        with closing(GGUFWriter(file, self.arch)) as writer:
            if "general.alignment" in fields:
                writer.data_alignment = fields["general.alignment"].value
            write_fields(writer, fields)
            for stored in left:
                own, shape = slices[stored.name], list(stored.data.shape)
                if own.kept is not None:
                    shape[0] = len(own.kept)
                size = int(np.prod(shape)) * stored.data.dtype.itemsize
                writer.add_tensor_info(own.name, shape, stored.data.dtype, size, stored.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for stored in left:
                own = slices[stored.name]
                writer.write_tensor_data(cast("Any", _Left(own.bytes_of(stored), own.pieces(stored), advance)))
                self._mapped.let_go()

    def _verify(self, file: Path, slices: Slices) -> None:
        mapped = MappedGguf(GgufFile(file, file.name), field="save_model")
        written = {stored.name: stored for stored in mapped.tensors}
        for stored in self.tensors:
            own = slices.get(stored.name)
            if own is None:
                continue
            found = written.get(own.name)
            if found is None or found.tensor_type != stored.tensor_type or not _same(found.data, own.pieces(stored)):
                raise VerificationError(f"{file} does not hold {own.name} as {self.file.name} holds {stored.name}")
            for one in (mapped, self._mapped):
                one.let_go()


def _same(data: Any, pieces: Iterator[Any]) -> bool:
    """Return whether a tensor is the concatenation of these pieces."""
    at = 0
    for piece in pieces:
        if not np.array_equal(data[at : at + len(piece)], piece):
            return False
        at += len(piece)
    return at == len(data)
