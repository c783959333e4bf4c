"""A GGUF file with fewer tokens, made from another one; rows are copied as stored, whatever their type."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from coprune.base.errors import UnsupportedModel
from coprune.base.progress import Reporter
from coprune.gguf_files.slices import Slice, Sliced
from coprune.gguf_files.vocabulary_metadata import named_ids, tokens_in, without_tokens
from coprune.model.checkpoint.load import load_tokenizer
from coprune.model.checkpoint.locate import GgufFile, Location
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.folder_cut import require_same_tokens
from coprune.vocabulary.kinds import Vocabulary
from coprune.vocabulary.tables import Table

_TABLES = ("token_embd.weight", "output.weight", "output.bias", "per_layer_token_embd.weight")


class Gguf(Sliced):
    """A GGUF file to cut: its metadata, its tensors, and those with a row per token."""

    def __init__(self, file: GgufFile) -> None:
        """Read all but the tensors' values. Raises BadInput or UnsupportedModel if the file cannot be cut."""
        super().__init__(file)
        self.location: Location = file
        self.rows = len(tokens_in(self.fields))
        self.tables: dict[str, Table] = {}
        for stored in self.tensors:
            shape = tuple(int(size) for size in reversed(stored.shape))
            if stored.name in _TABLES:
                self.tables[stored.name] = Table(0, shape[0])
            elif self.rows in shape and not stored.name.startswith("blk."):
                raise UnsupportedModel(f"{stored.name} is as long as the vocabulary, but its meaning is unknown")
        if any(table.size > self.rows for table in self.tables.values()):
            raise UnsupportedModel(f"{file.name} has rows for more tokens than it names")

    @property
    def named(self) -> set[int]:
        """Ids in the metadata."""
        return named_ids(self.fields)

    @cached_property
    def processor(self) -> PreTrainedTokenizerBase:
        """The tokenizer that transformers makes of the file."""
        return load_tokenizer(self.file)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the `tokenizer.json` that transformers makes of the file."""
        return Vocabulary.of(json.loads(self.processor.backend_tokenizer.to_str()))

    def notes(self, kept: Kept) -> list[str]:
        """Return no notes: a GGUF file's keys say what is an id."""
        return []

    def slices(self, kept: Kept) -> dict[str, Slice]:
        """Return the slices to keep of every tensor."""
        rows = {name: kept.rows[: kept.below(table.size)] for name, table in self.tables.items()}
        return {stored.name: Slice(stored.name, rows.get(stored.name)) for stored in self.tensors}

    def bytes_of(self, kept: Kept) -> tuple[int, int]:
        """Return the bytes of all tensors before and after a cut."""
        return self.sizes(self.slices(kept))

    def cut(self, target: Path, kept: Kept, reporter: Reporter) -> Path:
        """Write the file with the kept tokens.

        Raises:
            BadInput: the target exists.
            VerificationError: the written tokenizer differs from the expected one.
        """
        slices = self.slices(kept)
        self.write(target, slices, without_tokens(self.fields, self.arch, kept.old), reporter)
        # transformers adds its class's default tokens, which a GGUF file cannot override.
        beyond = {token for token, number in self.processor.get_vocab().items() if number >= self.rows}
        require_same_tokens(self.processor, GgufFile(target, target.name), kept, beyond)
        return target
