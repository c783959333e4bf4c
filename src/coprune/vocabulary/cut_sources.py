"""The sources of a vocabulary cut: a folder or a GGUF file, with one interface."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.progress import Reporter
from coprune.model.checkpoint.companions import save_companions
from coprune.model.checkpoint.load import load_model, load_tokenizer, quiet_transformers
from coprune.model.checkpoint.locate import Location, ModelFolder
from coprune.model.checkpoint.shards import read_json, stored_entries
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.folder_cut import (
    bytes_of,
    cut_folder,
    refuse_folder,
    stale_files,
    tokenizer_content,
)
from coprune.vocabulary.gguf import Gguf
from coprune.vocabulary.kinds import Vocabulary
from coprune.vocabulary.settings import Settings
from coprune.vocabulary.tables import rows_of, skeleton


class Source(Protocol):
    """A model whose vocabulary is cut."""

    location: Location

    @property
    def rows(self) -> int:
        """Number of rows of the embedding."""
        ...

    @property
    def named(self) -> set[int]:
        """Ids that settings name."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """All tokens."""
        ...

    def notes(self, kept: Kept) -> list[str]:
        """Return notes on what a cut cannot decide, one per line."""
        ...

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """The tokenizer as transformers loads it."""
        ...

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        ...

    def bytes_of(self, kept: Kept) -> tuple[int, int]:
        """Return the bytes of all weights before and after a cut."""
        ...

    def cut(self, target: Path, kept: Kept, reporter: Reporter) -> Path:
        """Write the model with the kept tokens and return the target."""
        ...


class FolderSource:
    """A folder."""

    def __init__(self, folder: ModelFolder, asked: str | None) -> None:
        """Open a folder. asked: the name that the user gave. Raises BadInput or UnsupportedModel if it cannot be cut."""
        self.location: Location = folder
        self.folder, self._asked = folder, asked
        refuse_folder(folder)
        self.vocabulary = Vocabulary.of(tokenizer_content(folder))
        self.config = read_json(folder.path / "config.json")

    @cached_property
    def processor(self) -> PreTrainedTokenizerBase:
        """As in `Source`."""
        return load_tokenizer(self.folder)

    @cached_property
    def rows(self) -> int:
        """As in `Source`."""
        return rows_of(skeleton(self.folder, self.config))

    @cached_property
    def _settings(self) -> Settings:
        return Settings.of(self.folder, self.processor, self.vocabulary, self.rows)

    @property
    def named(self) -> set[int]:
        """As in `Source`."""
        return self._settings.named

    def notes(self, kept: Kept) -> list[str]:
        """As in `Source`."""
        stale = stale_files(self.folder)
        left_out = [f"left out, since they hold the old vocabulary: {', '.join(stale)}"] if stale else []
        return [*left_out, *self._settings.notes(kept)]

    @property
    def parameters(self) -> int:
        """As in `Source`."""
        sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
        return sum(entry.nbytes // sizes.get(entry.dtype, 1) for entry in stored_entries(self.folder.path).values())

    def bytes_of(self, kept: Kept) -> tuple[int, int]:
        """Return the sizes as in `Source`."""
        return bytes_of(self.folder, self.config, kept)

    def cut(self, target: Path, kept: Kept, reporter: Reporter) -> Path:
        """Cut as in `Source`."""
        return cut_folder(self.folder, target, kept, reporter, self._asked)


@contextmanager
def saved(model: PreTrainedModel, processor: Any) -> Iterator[Path]:
    """Yield a temporary folder with a model in memory."""
    with tempfile.TemporaryDirectory(prefix="coprune-") as folder:
        with quiet_transformers():
            model.save_pretrained(folder)
        save_companions(model, processor, Path(folder))
        yield Path(folder)


def opened(location: Location, asked: str | None, to_gguf: bool) -> Iterator[Source]:
    """Yield the source of a cut: a GGUF file itself if the target is one, else its dequantised model. Raises like the sources."""
    if isinstance(location, ModelFolder):
        yield FolderSource(location, asked)
    elif to_gguf:
        yield Gguf(location)
    else:
        model, processor = load_model(location)
        with saved(model, processor) as folder:
            del model
            yield FolderSource(ModelFolder(folder, location.name), asked)


source_of = contextmanager(opened)


def described(content: dict[str, Any]) -> str:
    """Return the kind of a tokenizer in a word."""
    model = content["model"]
    if model["type"] == "BPE":
        return "byte-level BPE" if '"ByteLevel"' in json.dumps(content.get("pre_tokenizer")) else "BPE"
    return str(model["type"])
