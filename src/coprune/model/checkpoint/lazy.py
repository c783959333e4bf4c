"""A checkpoint folder as a model whose blocks are read when they are needed and freed afterwards.

Memory use depends on the acquired blocks, not on the size of the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from coprune.base.devices import device_memory, in_host_memory, is_accelerator, is_out_of_memory
from coprune.base.errors import BadInput
from coprune.model.checkpoint.companions import Companions
from coprune.model.checkpoint.conversion import Renamed, require_floats
from coprune.model.checkpoint.deferred import deferred
from coprune.model.checkpoint.empty import without_weights
from coprune.model.checkpoint.load import class_for, explained, prepare, quiet_transformers, read_config
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.names import is_below, is_below_any
from coprune.model.checkpoint.shards import DTYPES, TensorEntry, read_ahead, read_entries, read_tensor, stored_entries
from coprune.model.checkpoint.source import FLOATS, Source
from coprune.model.checkpoint.source_encoding import source_encoding
from coprune.model.checkpoint.weights import Uncut
from coprune.model.transformers_private import (
    build,
    computed_parameters,
    initialize_again,
    name_model,
    tie_read_weights,
    tied_pairs,
)
from coprune.recipe.parts import DtypeName
from coprune.recipe.pattern import Grid

SHARE = 8
"""A block is prefetched only if it takes at most this share of the device's free memory."""
_AT_ONCE = 1 << 24
"""Number of bytes hashed at a time."""
_LARGE = 1 << 28
"""Minimum bytes of a tensor that is read alone: transformers reads what it gets at the same time, and decoding takes copies."""


def has_room(nbytes: int, device: torch.device) -> bool:
    """Return whether a device has room for another block of `nbytes` bytes."""
    there = device_memory(device)
    return there is not None and there.available is not None and nbytes * SHARE <= there.available


def fetches(nbytes: int, device: torch.device) -> bool:
    """Return whether `Ahead` prefetches blocks of `nbytes` bytes to a device."""
    return is_accelerator(device) and has_room(nbytes, device)


class Ahead:
    """Prefetches tensors from files."""

    def __init__(self, channel: Channel, device: torch.device) -> None:
        self._channel, self._device = channel, device
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="coprune-ahead")
        self._coming: dict[TensorEntry, Future[Coming]] = {}

    def begin(self, entries: Sequence[TensorEntry]) -> bool:
        """Start prefetching tensors, dropping unused earlier ones; return whether there is room."""
        for future in self._coming.values():
            future.cancel()
        self._coming = {}
        if not has_room(sum(entry.nbytes for entry in entries), self._device):
            return False
        self._coming = {entry: self._reader.submit(self._fetch, entry) for entry in entries}
        return True

    def take(self, entry: TensorEntry) -> Tensor | None:
        """Return a prefetched tensor on the device, or None. Raises as `read_tensor`."""
        future = self._coming.pop(entry, None)
        if future is None:
            return None
        try:
            return future.result().arrive()
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                return None  # retry by reading: the previous block is freed by now
            raise

    def _fetch(self, entry: TensorEntry) -> Coming:
        return self._channel.send(read_tensor(entry, self._channel.buffer))


def ahead_to(device: torch.device) -> Ahead | None:
    """Return the prefetcher of blocks for a device; None for host memory."""
    channel = channel_to(device)
    return None if channel is None else Ahead(channel, device)


class Coming(Protocol):
    """A tensor on its way."""

    def arrive(self) -> Tensor:
        """Wait for the tensor and return it."""
        ...


class Channel(Protocol):
    """A copy channel to a device, for a thread that reads while another computes."""

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate host memory that can be sent."""
        ...

    def send(self, held: Tensor) -> Coming:
        """Start copying a buffer, which must not change any more."""
        ...


@dataclass(frozen=True)
class Sent:
    """A tensor that a side stream copies; implements `Coming`."""

    tensor: Tensor
    copied: torch.Event
    computing: torch.Stream

    def arrive(self) -> Tensor:
        self.computing.wait_event(self.copied)
        return self.tensor


class SideStream:
    """A copy stream beside the device's compute stream at creation; implements `Channel`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._computing = torch.accelerator.current_stream(device)
        self._stream = torch.Stream(device)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Torch reuses the memory only after the copy.
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def send(self, held: Tensor) -> Sent:
        with self._stream:
            tensor = torch.empty_like(held, device=self._device)
            # The memory may belong to a released block that the device still uses.
            self._stream.wait_event(self._computing.record_event())
            tensor.copy_(held, non_blocking=True)
        return Sent(tensor, self._stream.record_event(), self._computing)


def channel_to(device: torch.device) -> Channel | None:
    """Return a copy channel to a device, beside its computations; None if there is none."""
    return SideStream(device) if is_accelerator(device) else None


@dataclass(frozen=True)
class Unread:
    """A tensor in a file, read when transformers slices it."""

    entry: TensorEntry
    name: str = ""
    uncut: Uncut | None = None
    """Restores the model's shape if the stored tensor was cut."""
    ahead: Ahead | None = None
    """The prefetcher that may hold it already."""
    apart: bool = False
    """Whether to defer reading until multiplication, where possible."""

    def __getitem__(self, everything: object) -> Tensor:
        if self.apart and (there := deferred(self.entry, None if self.uncut is None else self._in_full)) is not None:
            return there
        if self.ahead is not None and (fetched := self.ahead.take(self.entry)) is not None:
            return fetched
        tensor = read_tensor(self.entry)
        return tensor if self.uncut is None else self._in_full(tensor)

    def _in_full(self, tensor: Tensor) -> Tensor:
        assert self.uncut is not None
        return self.uncut({self.name: tensor})[self.name]


class LazyCheckpoint:
    """The model of a folder, streamed; implements `weights.Weights`.

    dtype: "auto" computes in the configuration's dtype and writes every tensor in its own; another is used for both.
    experts_apart: keep experts in their files until they are multiplied, one at a time; they cannot be changed then. Raises
    BadInput if the folder is damaged or lacks weights, before any weight is read.
    """

    streams = True
    _shared: frozenset[str] = frozenset()
    """Names of parameters tied to one in a block, known after `acquire_rest`."""

    def __init__(
        self,
        location: ModelFolder,
        dtype: DtypeName = "auto",
        device: torch.device | str = "cpu",
        experts_apart: bool = False,
    ) -> None:
        self._apart = experts_apart and in_host_memory(torch.device(device))
        self.location = location
        self.device = torch.device(device)
        self.stored_as = source_encoding(location.path, None if dtype == "auto" else getattr(torch, dtype))
        self._entries = stored_entries(location.path) if self.stored_as is None else dict(self.stored_as.entries)
        self._uncut: dict[str, Uncut | None] = {}
        self._ahead = ahead_to(self.device)
        with quiet_transformers(), explained(location):
            config = read_config(location.path)
            self.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or self._first_dtype()
            self._model = build_skeleton(location, config, self.dtype, self.device)
        self.source = Source(location, self._model, dtype, self._entries)
        require_floats(self._model, self._entries)

    @property
    def model(self) -> PreTrainedModel:
        """The model; parameters of blocks that are not acquired are on the meta device."""
        return self._model

    @property
    def carried_entries(self) -> dict[str, TensorEntry]:
        """Entries of tensors that the model does not load, saved unchanged."""
        return self.source.carried_entries

    @property
    def total_bytes(self) -> int:
        return self.source.total_bytes

    @property
    def stored_share(self) -> float:
        return 1.0 if self.stored_as is None else self.stored_as.bytes_of(self.total_bytes) / self.total_bytes

    def _first_dtype(self) -> torch.dtype:
        return next((DTYPES[e.dtype] for e in self._entries.values() if e.dtype in FLOATS), torch.float32)

    def grid_of(self, parameter: str) -> Grid | None:
        return self.source.grid_of(parameter)

    def acquire(self, prefix: str) -> None:
        """Read the parameters and buffers below a module's path. Raises BadInput if one is missing."""
        self._load(self._own(prefix))
        self._require_real(self._model.get_submodule(prefix).named_parameters(prefix))

    def acquire_rest(self, block_prefixes: Sequence[str]) -> None:
        """Read everything outside the blocks (embeddings, norms, head) and tie what the configuration ties.

        Parameters that a block shares with another part are read too, and stay in memory.
        """
        self._shared = self._shared_by(block_prefixes)

        def stays(name: str) -> bool:
            return name in self._shared or not is_below_any(name, block_prefixes)

        self._load([group for group in self.source.conversion.groups if stays(group.target)])
        outside = [(n, p) for n, p in self._named_parameters() if stays(n)]
        missing = {name for name, parameter in outside if parameter.is_meta}
        with quiet_transformers():
            tie_read_weights(self._model, missing)
            self._compute(computed_parameters(self._model, missing))
        self._require_real((n, p) for n, p in self._named_parameters() if stays(n))
        self._shared = self._shared_by(block_prefixes)  # tying excludes those whose stored values differ

    def _shared_by(self, block_prefixes: Sequence[str]) -> frozenset[str]:
        """Return the names of parameters that are tied to one in a block."""
        tied = (pair for pair in tied_pairs(self._model) if any(is_below_any(name, block_prefixes) for name in pair))
        return frozenset(name for pair in tied for name in pair)

    def _own(self, prefix: str) -> list[Renamed]:
        """Return the tensors below a module's path that are not shared with other parts of the model."""
        return [group for group in self.source.below(prefix) if group.target not in self._shared]

    def _compute(self, names: Iterable[str]) -> None:
        """Compute parameters that are never stored, if they are still on the meta device."""
        modules = []
        for path, _, own in (name.rpartition(".") for name in names):
            module = self._model.get_submodule(path)
            if (parameter := module._parameters[own]) is not None and parameter.is_meta:
                empty = torch.empty_like(parameter, device=self.device)
                module._parameters[own] = nn.Parameter(empty, requires_grad=False)
                modules.append(module)
        if modules:
            initialize_again(self._model, modules)

    def prefetch(self, prefix: str) -> None:
        """Prefetch a block's tensors to the device, or into the system's page cache."""
        names = [name for group in self._own(prefix) for name in group.originals]
        whole = [self._entries[name] for name in names if self._uncut.get(name) is None]
        if self._ahead is None or not self._ahead.begin(whole):
            read_ahead(self._entries[name] for name in names)

    def release(self, prefix: str) -> None:
        """Free the parameters below a module's path; unwritten changes are lost."""
        forget_parameters(self._model.get_submodule(prefix), {n.removeprefix(f"{prefix}.") for n in self._shared})

    def original_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return an acquired block's tensors under the checkpoint's names, in its layout and dtypes (or the requested one)."""
        below = {name: tensor for name, tensor in self._model.state_dict().items() if is_below(name, prefix)}
        return self.source.as_written(self.source.below(prefix), below)

    def layout(self, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a block's values under the checkpoint's names and in its layout."""
        return self.source.conversion.revert(self.source.below(prefix), state)

    def digests(self, prefix: str) -> dict[str, bytes]:
        """Return the SHA-256 of every tensor of a block in the files."""
        names = [name for group in self.source.below(prefix) for name in group.originals]
        return {name: _digest(self._entries[name]) for name in names}

    def rest_tensors(self, block_prefixes: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors outside the blocks, including those that the model does not load."""
        state = {n: t for n, t in self._model.state_dict().items() if not is_below_any(n, block_prefixes)}
        return self.source.as_written(self.source.outside(block_prefixes), state) | self.source.carried()

    def in_file(self, changes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Translate changes of the model's configuration to its file, which may use other names and places."""
        return self.source.in_file(changes)

    def write_companions(self, folder: Path, beside: Companions) -> None:
        """Copy the files beside the weights; a processor is copied unchanged."""
        self.source.write_companions(folder, beside)

    def read_from(self, file: Path, uncut: Uncut | None = None) -> None:
        """Read the tensors in this file from it from now on: a block finished by an earlier run."""
        entries = read_entries(file)
        if self.stored_as is not None:
            entries = self.stored_as.decoded(entries)
        self._entries.update(entries)
        self._uncut |= dict.fromkeys(entries, uncut)

    def _load(self, groups: Sequence[Renamed]) -> None:
        """Convert group by group, so that at most one merged or large parameter exists twice at a time."""
        plain = [group.originals[0] for group in groups if not group.converted]
        large = [name for name in plain if self._entries[name].nbytes >= _LARGE]
        small = [name for name in plain if name not in large]
        apart = {name for group in groups if self._stays(group) for name in group.originals}
        with quiet_transformers():
            for names in [
                *([name] for name in large),
                small,
                *(group.originals for group in groups if group.converted),
            ]:
                slices = {name: self._unread(name, name in apart) for name in names}
                self.source.conversion.load(slices, self.dtype, self.device)
        for group in groups:
            self._model.get_parameter_or_buffer(group.target).requires_grad_(False)

    def _stays(self, group: Renamed) -> bool:
        """Return whether a group is a layer's experts, which stay in their files."""
        return self._apart and self._model.get_parameter_or_buffer(group.target).ndim == 3

    def _unread(self, name: str, apart: bool = False) -> Unread:
        return Unread(self._entries[name], name, self._uncut.get(name), self._ahead, apart)

    def _named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self._model.named_parameters(remove_duplicate=False)

    def _require_real(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        missing = [name for name, parameter in parameters if parameter.is_meta]
        if missing:
            cause = f"the checkpoint of {self.location.name} lacks {missing[0]} ({len(missing)} weights in all)"
            raise BadInput(cause, fix="fetch or save the checkpoint again")


def build_skeleton(location: ModelFolder, config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build the model of a folder, prepared for the walk, with its generation settings.

    Args:
        location: the folder.
        config: its configuration.
        dtype: of the parameters.
        device: where the buffers go.
    """

    def built() -> PreTrainedModel:
        model = build(class_for(config), config, dtype=dtype)
        _compute_buffers(model)
        return model

    with without_weights():
        model = built()
    if any(buffer.is_meta for buffer in model.buffers()):
        # Some of timm's modules compute their tables on their parameters' device, which must not be meta.
        model = built()
        forget_parameters(model)
    name_model(model, location.name)
    if (location.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(location.path)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return prepare(model)


def forget_parameters(root: nn.Module, kept: Collection[str] = ()) -> None:
    """Move the parameters below a module to the meta device, except the kept names; shared ones stay shared."""
    forgotten: dict[int, nn.Parameter] = {}
    for path, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if ".".join(part for part in (path, name) if part) in kept:
                continue
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            module._parameters[name] = forgotten.setdefault(id(parameter), empty)


def _compute_buffers(model: PreTrainedModel) -> None:
    """Recompute a new model's buffers in float32, as from_pretrained does.

    A model is built with its own dtype as the default, to which some families would round their position tables.
    """
    initialize_again(model, [module for module in model.modules() if any(True for _ in module.buffers(recurse=False))])


def _digest(entry: TensorEntry) -> bytes:
    digest = hashlib.sha256()
    for stored in entry.stored:
        with stored.file.open("rb") as stream:
            stream.seek(stored.start)
            for start in range(0, stored.nbytes, _AT_ONCE):
                digest.update(stream.read(min(_AT_ONCE, stored.nbytes - start)))
    return digest.digest()
