"""The source and destination of a block's weights during a walk.

A model in memory always holds them; a streamed one (`lazy.LazyCheckpoint`) reads a block when it is acquired and frees it when
it is released. Both return a block's tensors under the names and in the layout of a checkpoint. These can differ from the
model's: in a mixture of experts, the model holds a layer's experts in one tensor.
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
from coprune.base.words import Set
from coprune.model.checkpoint.companions import Companions, save_companions
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
    """A model whose blocks can be loaded and freed. A prefix is a module's path, such as `model.layers.3`."""

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def streams(self) -> bool:
        """Whether a block is in memory only between acquire and release; changes that are not written are lost."""
        ...

    @property
    def stored_as(self) -> SourceEncoding | None:
        """Encoding of the files' quantised weights; None for plain weights, or without files."""
        ...

    @property
    def total_bytes(self) -> int:
        """Size in bytes of all tensors as they would be written."""
        ...

    @property
    def stored_share(self) -> float:
        """Size of the tensors in the source relative to their decoded size."""
        ...

    @property
    def carried_entries(self) -> Mapping[str, TensorEntry]:
        """Entries of tensors that the model does not load, saved unchanged; empty without files."""
        ...

    def grid_of(self, parameter: str) -> Grid | None:
        """Return a function that rounds to the values representable in a matrix's stored format; None if any value is."""
        ...

    def acquire(self, prefix: str) -> None:
        """Load the block's parameters."""
        ...

    def prefetch(self, prefix: str) -> None:
        """Prefetch a block."""
        ...

    def release(self, prefix: str) -> None:
        """Free the block's parameters if they can be read again."""
        ...

    def read_from(self, file: Path, uncut: Uncut | None = None) -> None:
        """Read the tensors in this safetensors file from it from now on: a finished block.

        uncut: restores the model's shapes of cut tensors.
        """
        ...

    def original_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return an acquired block's current tensors as a checkpoint stores them."""
        ...

    def layout(self, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a block's tensors as a checkpoint stores them. state: by the model's names."""
        ...

    def digests(self, prefix: str) -> dict[str, bytes]:
        """Return the SHA-256 of every tensor of an unchanged block as stored, to identify the model."""
        ...

    def rest_tensors(self, block_prefixes: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors outside all blocks as a checkpoint stores them."""
        ...

    def in_file(self, changes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Translate changes of the model's configuration to the `config.json` that is written with it.

        Both map dotted paths to new values; None if the file cannot express them.
        """
        ...

    def write_companions(self, folder: Path, beside: Companions) -> None:
        """Write the files that complete a folder of these weights: configuration, generation settings, tokenizer."""
        ...


class InMemory:
    """A model that is completely in memory."""

    streams = False

    def __init__(self, model: PreTrainedModel, source: Source | None = None) -> None:
        """Wrap a model in memory. source: the folder whose layout to save in; by default transformers' layout."""
        self._model = model
        self._source = source
        self._names = source if source is not None and source.is_revertible() else None
        """The source, if transformers can restore its names and dtypes."""

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

    def prefetch(self, prefix: str) -> None:
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
        else:
            save_companions(self._model, beside.processor, folder)

    def _state(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._model.state_dict().items() if wanted(name)}

    def _reverted(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Return the tensors with wanted names, in the checkpoint's layout."""
        state = {name: tensor for name, tensor in saved_tensors(self._model).items() if wanted(name)}
        return revert_conversion(self._model, state)


def bytes_in(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in host memory, without a copy if it is already contiguous there."""
    raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def require_in_memory(weights: Weights, field: str) -> None:
    """Raise BadInput if the model is streamed. field: the setting that changes weights before pruning."""
    if weights.streams:
        raise BadInput(f"{field} needs the whole model in memory", field=field, fix=("add ", Set("stream", False)))
