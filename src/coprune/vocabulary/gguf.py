"""A GGUF file with fewer tokens, made from another one: rows are copied as they are stored, whatever their type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from coprune.base.errors import BadInput, UnsupportedModel, VerificationError
from coprune.base.files import write_durably
from coprune.base.progress import Reporter
from coprune.gguf_files.metadata import Field, architecture, read_fields, write_fields
from coprune.gguf_files.vocabulary import named_ids, tokens_in, without_tokens
from coprune.model.checkpoint.load import gguf_reader, load_tokenizer
from coprune.model.checkpoint.locate import GgufFile
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.folder import Written, require_same_tokens
from coprune.vocabulary.tables import Table

_TABLES = ("token_embd.weight", "output.weight", "output.bias", "per_layer_token_embd.weight")
_WRITERS = ("GGUF.", "general.architecture")


class Gguf:
    """A file that is cut: its metadata, its tensors, and which of these have rows for tokens."""

    def __init__(self, file: GgufFile) -> None:
        """Read all but the tensors' values. Raises BadInput or UnsupportedModel where the file cannot be cut."""
        self.file = file
        self.reader = gguf_reader(file.path, field="model")
        self.fields: Mapping[str, Field] = read_fields(self.reader, _WRITERS)
        if "split.count" in self.fields and self.fields["split.count"].value > 1:
            raise BadInput(
                f"{file.name} is one of several parts", field="model", value=file.name, fix="join them first"
            )
        self.rows = len(tokens_in(self.fields))
        self.tables: dict[str, Table] = {}
        for stored in self.reader.tensors:
            shape = tuple(int(size) for size in reversed(stored.shape))
            if stored.name in _TABLES:
                self.tables[stored.name] = Table(0, shape[0])
            elif self.rows in shape and not stored.name.startswith("blk."):
                raise UnsupportedModel(f"{stored.name} is as long as the vocabulary, and it is unknown what it is")
        if any(table.size > self.rows for table in self.tables.values()):
            raise UnsupportedModel(f"{file.name} has rows for more tokens than it names")

    @property
    def named(self) -> set[int]:
        """Ids that the metadata name."""
        return named_ids(self.fields)

    def tokenizer_content(self) -> dict[str, Any]:
        """Return the content of the `tokenizer.json` that transformers makes of the file."""
        found: dict[str, Any] = json.loads(load_tokenizer(self.file).backend_tokenizer.to_str())
        return found

    def bytes_of(self, kept: Kept) -> tuple[int, int]:
        """Return the bytes of all tensors before and after a cut."""
        before = sum(int(stored.n_bytes) for stored in self.reader.tensors)
        gone = 0
        for stored in self.reader.tensors:
            if (table := self.tables.get(stored.name)) is not None:
                gone += int(stored.n_bytes) // table.size * (table.size - kept.below(table.size))
        return before, before - gone

    @property
    def stale(self) -> list[str]:
        """As of a folder: a file holds its vocabulary once."""
        return []

    def cut(self, target: Path, kept: Kept, reporter: Reporter, card: str = "") -> Written:
        """Write the file with the tokens that stay; it has no place for a card.

        Raises:
            BadInput: the target is taken.
            VerificationError: the tokenizer that was written is not the one that should be there.
        """
        if target.exists():
            raise BadInput(f"{target} already exists", field="save_model", value=target, fix="choose another name")
        before, after = self.bytes_of(kept)

        def write(file: Path) -> None:
            with reporter.bar("Writing", after) as advance:
                self._write(file, kept, advance)
            self._verify(file, kept)

        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, write)
        require_same_tokens(self.file, GgufFile(target, target.name), kept)
        return Written(target, before, after, self.tables)

    def _write(self, file: Path, kept: Kept, advance: Any) -> None:
        from gguf import GGUFWriter

        arch = architecture(self.reader)
        with closing(GGUFWriter(file, arch)) as writer:
            if "general.alignment" in self.fields:
                writer.data_alignment = self.fields["general.alignment"].value
            write_fields(writer, without_tokens(self.fields, arch, kept.old))
            for stored in self.reader.tensors:
                shape = list(stored.data.shape)
                if stored.name in self.tables:
                    shape[0] = kept.below(self.tables[stored.name].size)
                size = int(np.prod(shape)) * stored.data.dtype.itemsize
                writer.add_tensor_info(stored.name, shape, stored.data.dtype, size, stored.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for stored in self.reader.tensors:
                data = self._cut(stored, kept)
                writer.write_tensor_data(data)
                advance(data.nbytes)

    def _cut(self, stored: Any, kept: Kept) -> Any:
        table = self.tables.get(stored.name)
        return stored.data if table is None else stored.data[kept.rows[: kept.below(table.size)]]

    def _verify(self, file: Path, kept: Kept) -> None:
        written = {stored.name: stored for stored in gguf_reader(file, field="save_model").tensors}
        for stored in self.reader.tensors:
            found = written.get(stored.name)
            if (
                found is None
                or found.tensor_type != stored.tensor_type
                or not np.array_equal(found.data, self._cut(stored, kept))
            ):
                raise VerificationError(f"{file} does not hold {stored.name} as {self.file.name} does")
