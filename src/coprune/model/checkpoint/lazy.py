"""A checkpoint folder as a model whose blocks are read when they are needed and let go of afterwards.

The memory in use is what the acquired blocks need, whatever the size of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.words import Set
from coprune.model.checkpoint.ahead import Ahead, ahead_to
from coprune.model.checkpoint.companions import Companions
from coprune.model.checkpoint.conversion import Renamed, require_floats
from coprune.model.checkpoint.encoding import DENSE, Encoding
from coprune.model.checkpoint.header import DTYPES
from coprune.model.checkpoint.load import DtypeName, explained, quiet_transformers, read_config
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.names import is_below, is_below_any
from coprune.model.checkpoint.shards import (
    TensorEntry,
    checkpoint_entries,
    read_ahead,
    read_entries,
    read_tensor,
)
from coprune.model.checkpoint.skeleton import build_skeleton, forget_parameters
from coprune.model.checkpoint.source import FLOATS, Source
from coprune.model.checkpoint.weights import Uncut, piece_places
from coprune.model.transformers_private import tie_read_weights


@dataclass(frozen=True)
class Unread:
    """A tensor in a file, which is read when transformers slices it."""

    entry: TensorEntry
    encoding: Encoding
    name: str = ""
    uncut: Uncut | None = None
    """What gives a tensor that was made smaller its shape in the model."""
    ahead: Ahead | None = None
    """What may have fetched it already."""

    def __getitem__(self, everything: object) -> Tensor:
        if self.ahead is not None and (fetched := self.ahead.take(self.entry)) is not None:
            return fetched
        tensor = self.encoding.decode(read_tensor(self.entry))
        return tensor if self.uncut is None else self.uncut({self.name: tensor})[self.name]


class LazyCheckpoint:
    """The model of a folder, streamed; implements `weights.Weights`.

    dtype: "auto" computes in the configuration's and writes every tensor in its own; another is both computed in and
    written. encoding: how the files store their tensors. Raises BadInput if the folder is damaged or lacks weights,
    before any weight is read.
    """

    streams = True

    def __init__(
        self,
        location: ModelFolder,
        dtype: DtypeName = "auto",
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        encoding: Encoding = DENSE,
    ) -> None:
        self._encoding = encoding
        self.location = location
        self.device = torch.device(device)
        self._entries = checkpoint_entries(location.path)
        self._uncut: dict[str, Uncut | None] = {}
        # Other encodings are decoded in host memory.
        self._ahead = ahead_to(self.device) if encoding is DENSE else None
        with quiet_transformers(), explained(location):
            config = read_config(location.path, trust_remote_code)
            self.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or self._first_dtype()
            self._model = build_skeleton(location, config, self.dtype, self.device, trust_remote_code)
        self.source = Source(location, self._model, dtype, self._entries)
        if encoding is DENSE:
            require_floats(self._model, self._entries)

    @property
    def model(self) -> PreTrainedModel:
        """The model; parameters that are not acquired are on the meta device."""
        return self._model

    @property
    def carried_entries(self) -> dict[str, TensorEntry]:
        """Where the tensors lie that the model does not load, which are written as they are."""
        return self.source.carried_entries

    @property
    def total_bytes(self) -> int:
        return self.source.total_bytes

    def _first_dtype(self) -> torch.dtype:
        return next((DTYPES[e.dtype] for e in self._entries.values() if e.dtype in FLOATS), torch.float32)

    def acquire(self, prefix: str) -> None:
        """Read the parameters and buffers below a module's path. Raises BadInput if the files lack one."""
        self._refuse_shared(prefix)
        self._load(self.source.below(prefix))
        self._require_real(self._model.get_submodule(prefix).named_parameters(prefix))

    def acquire_rest(self, block_prefixes: Sequence[str]) -> None:
        """Read everything outside the blocks (embeddings, norms, head) and tie what the configuration ties."""
        self._load(self.source.outside(block_prefixes))
        outside = [(n, p) for n, p in self._named_parameters() if not is_below_any(n, block_prefixes)]
        missing = {name for name, parameter in outside if parameter.is_meta}
        with quiet_transformers():
            tie_read_weights(self._model, missing)
        self._require_real((n, p) for n, p in self._named_parameters() if not is_below_any(n, block_prefixes))

    def expect(self, prefix: str) -> None:
        """Begin to bring a block's tensors to the device, or in host memory to read them, where the system can."""
        names = [name for group in self.source.below(prefix) for name in group.originals]
        whole = [self._entries[name] for name in names if self._uncut.get(name) is None]
        if self._ahead is None or not self._ahead.begin(whole):
            read_ahead(self._entries[name] for name in names)

    def release(self, prefix: str) -> None:
        """Forget the parameters below a module's path; what was changed and not written is lost."""
        forget_parameters(self._model.get_submodule(prefix))

    def original_tensors(self, prefix: str) -> dict[str, Tensor]:
        """An acquired block's tensors under the checkpoint's names, in its layout and dtypes (or the one asked for)."""
        below = {name: tensor for name, tensor in self._model.state_dict().items() if is_below(name, prefix)}
        return self.source.as_written(self.source.below(prefix), below)

    def layout(self, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A block's values under the checkpoint's names and in its layout."""
        return self.source.conversion.revert(self.source.below(prefix), state)

    def pieces(self, prefix: str) -> dict[str, bytes]:
        """A few bytes of every tensor of a block, read from the files."""
        names = [name for group in self.source.below(prefix) for name in group.originals]
        return {name: self._read_pieces(self._entries[name]) for name in names}

    def _read_pieces(self, entry: TensorEntry) -> bytes:
        with entry.file.open("rb") as stream:
            found = b""
            for place in piece_places(entry.nbytes):
                stream.seek(entry.start + place.start)
                found += stream.read(place.stop - place.start)
        return found

    def rest_tensors(self, block_prefixes: Sequence[str]) -> dict[str, Tensor]:
        """The tensors outside the blocks as they are written, with those that the model does not load."""
        state = {n: t for n, t in self._model.state_dict().items() if not is_below_any(n, block_prefixes)}
        return self.source.as_written(self.source.outside(block_prefixes), state) | self.source.carried()

    def in_file(self, changes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return changes of the model's configuration as changes of its file, which may use other names and places."""
        return self.source.in_file(changes)

    def write_companions(self, folder: Path, beside: Companions) -> None:
        """Copy what lies beside the weights, with another card; a processor is as it was read from there."""
        self.source.write_companions(folder, beside)

    def read_from(self, file: Path, uncut: Uncut | None = None) -> None:
        """From now on take the tensors that this file holds from it: a block that an earlier run finished."""
        entries = read_entries(file)
        self._entries.update(entries)
        self._uncut |= dict.fromkeys(entries, uncut)

    def _load(self, groups: Sequence[Renamed]) -> None:
        """Convert group by group, so that no more than one merged parameter exists twice at a time."""
        plain = [group.originals[0] for group in groups if not group.converted]
        with quiet_transformers():
            for names in [plain, *(group.originals for group in groups if group.converted)]:
                slices = {name: self._unread(name) for name in names}
                self.source.conversion.load(slices, self.dtype, self.device)
        for group in groups:
            self._model.get_parameter_or_buffer(group.target).requires_grad_(False)

    def _unread(self, name: str) -> Unread:
        return Unread(self._entries[name], self._encoding, name, self._uncut.get(name), self._ahead)

    def _named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self._model.named_parameters(remove_duplicate=False)

    def _require_real(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        missing = [name for name, parameter in parameters if parameter.is_meta]
        if missing:
            raise BadInput(f"the checkpoint of {self.location.name} lacks {missing[0]} ({len(missing)} weights in all)")

    def _refuse_shared(self, prefix: str) -> None:
        inside = {id(parameter) for parameter in self._model.get_submodule(prefix).parameters()}
        for name, parameter in self._named_parameters():
            if id(parameter) in inside and not is_below(name, prefix):
                raise UnsupportedModel(
                    f"{prefix} shares {name} with another part of the model, so it cannot be streamed",
                    fix=("load it whole with ", Set("stream", False)),
                )
