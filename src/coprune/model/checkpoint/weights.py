"""The source and destination of a block's weights during a walk.

A model in memory holds them all the time; a streamed one (`lazy.LazyCheckpoint`) reads a block when it is acquired and
frees it when it is released. Both return a block's tensors under the names and in the layout of a checkpoint, which for a
mixture of experts differ from the model's own, where the experts of a layer are one tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.words import Set
from coprune.model.checkpoint.companions import CARD_FILE, Companions, save_companions
from coprune.model.checkpoint.conversion import load_tensors
from coprune.model.checkpoint.load import quiet_transformers
from coprune.model.checkpoint.names import is_below, is_below_any
from coprune.model.checkpoint.shards import TensorEntry, read_entries, read_tensor
from coprune.model.checkpoint.source import Source
from coprune.model.checkpoint.source_encoding import SourceEncoding
from coprune.model.transformers_private import revert_conversion, saved_tensors
from coprune.recipe.pattern import Grid

Uncut = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class Weights(Protocol):
    """A model whose blocks are there when they are asked for. A prefix is a module's path: `model.layers.3`."""

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def streams(self) -> bool:
        """Whether a block is in memory only between acquire and release, so that later changes are lost."""
        ...

    @property
    def stored_as(self) -> SourceEncoding | None:
        """Encoding of quantised weights in its files; None for plain ones, or without files."""
        ...

    @property
    def total_bytes(self) -> int:
        """Size of all tensors as they would be written."""
        ...

    @property
    def stored_share(self) -> float:
        """Size of the tensors as their source stores them, over that of their values."""
        ...

    @property
    def carried_entries(self) -> Mapping[str, TensorEntry]:
        """Entries of tensors that the model does not load, saved unchanged; empty without files."""
        ...

    def grid_of(self, parameter: str) -> Grid | None:
        """Return what gives the nearest values that a matrix can hold as its source stores it; None where it can hold any."""
        ...

    def acquire(self, prefix: str) -> None:
        """Make the block's parameters real."""
        ...

    def expect(self, prefix: str) -> None:
        """Prefetch a block."""
        ...

    def release(self, prefix: str) -> None:
        """Free the block's parameters if they can be read again."""
        ...

    def read_from(self, file: Path, uncut: Uncut | None = None) -> None:
        """Read the tensors of this safetensors file from it in future: a finished block.

        uncut: restores the model's shapes of tensors that were made smaller.
        """
        ...

    def original_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return an acquired block's present tensors as a checkpoint stores them."""
        ...

    def layout(self, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a block's tensors as a checkpoint stores them. state: by the model's names."""
        ...

    def digests(self, prefix: str) -> dict[str, bytes]:
        """Return the SHA-256 of every tensor of an unchanged block as a checkpoint stores it, to identify the model."""
        ...

    def rest_tensors(self, block_prefixes: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors outside all blocks as a checkpoint stores them."""
        ...

    def in_file(self, changes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return changes of the model's configuration as changes of the `config.json` that is written beside it.

        Both are new values by their places, with dots between; None if that file cannot say them.
        """
        ...

    def write_companions(self, folder: Path, beside: Companions) -> None:
        """Write what makes a folder of these weights a model: configuration, generation settings, tokenizer, card."""
        ...


class InMemory:
    """A model that is wholly in memory."""

    streams = False

    def __init__(self, model: PreTrainedModel, source: Source | None = None) -> None:
        """Wrap a model in memory. source: the folder whose layout is saved; by default transformers'."""
        self._model = model
        self._source = source
        self._names = source if source is not None and source.leads_back() else None
        """The source, where transformers leads back to its names and dtypes."""

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    @property
    def stored_as(self) -> SourceEncoding | None:
        return None if self._names is None else self._names.stored_as

    @property
    def carried_entries(self) -> dict[str, TensorEntry]:
        return {} if self._source is None else self._source.carried_entries

    @property
    def total_bytes(self) -> int:
        if self._names is not None:
            return self._names.total_bytes
        return sum(tensor.numel() * tensor.element_size() for tensor in saved_tensors(self._model).values())

    @property
    def stored_share(self) -> float:
        return 1.0 if self.stored_as is None else self.stored_as.bytes_of(self.total_bytes) / self.total_bytes

    def grid_of(self, parameter: str) -> Grid | None:
        return None if self._names is None else self._names.grid_of(parameter)

    def acquire(self, prefix: str) -> None:
        pass

    def expect(self, prefix: str) -> None:
        pass

    def release(self, prefix: str) -> None:
        pass

    def read_from(self, file: Path, uncut: Uncut | None = None) -> None:
        if self.stored_as is None:
            tensors = load_file(file)
        else:
            entries = self.stored_as.decoded(read_entries(file))
            tensors = {name: read_tensor(entry) for name, entry in entries.items()}
        if uncut is not None:
            tensors = uncut(tensors)
        with quiet_transformers():
            load_tensors(self._model, tensors)

    def original_tensors(self, prefix: str) -> dict[str, Tensor]:
        if self._names is not None:
            return self._names.as_written(self._names.below(prefix), self._state(lambda name: is_below(name, prefix)))
        return self._reverted(lambda name: is_below(name, prefix))

    def layout(self, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._names is not None:
            return self._names.conversion.revert(self._names.below(prefix), state)
        return revert_conversion(self._model, state)

    def digests(self, prefix: str) -> dict[str, bytes]:
        tensors = self.original_tensors(prefix)
        return {name: hashlib.sha256(bytes_in(tensor)).digest() for name, tensor in tensors.items()}

    def rest_tensors(self, block_prefixes: Sequence[str]) -> dict[str, Tensor]:
        carried = {} if self._source is None else self._source.carried()

        def outside(name: str) -> bool:
            return not is_below_any(name, block_prefixes)

        if self._names is not None:
            return self._names.as_written(self._names.outside(block_prefixes), self._state(outside)) | carried
        return self._reverted(outside) | carried

    def in_file(self, changes: Mapping[str, Any]) -> dict[str, Any] | None:
        return dict(changes) if self._source is None else self._source.in_file(changes)

    def write_companions(self, folder: Path, beside: Companions) -> None:
        if self._source is not None:
            self._source.write_companions(folder, beside)
            return
        save_companions(self._model, beside.processor, folder)
        write_text(folder / CARD_FILE, beside.card)

    def _state(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._model.state_dict().items() if wanted(name)}

    def _reverted(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Return the saved tensors with wanted names, in the checkpoint's layout."""
        state = {name: tensor for name, tensor in saved_tensors(self._model).items() if wanted(name)}
        return revert_conversion(self._model, state)


def bytes_in(tensor: Tensor) -> memoryview:
    """Return a tensor's values as bytes in host memory, without a copy where they lie there in order."""
    raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def require_in_memory(weights: Weights, field: str) -> None:
    """Raise BadInput where blocks are on the disk. field: the setting that changes weights before any is pruned."""
    if weights.streams:
        raise BadInput(f"{field} needs the whole model in memory", field=field, fix=("add ", Set("stream", False)))
