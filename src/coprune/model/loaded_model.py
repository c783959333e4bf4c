"""Open the model of a recipe: in memory, or a folder whose blocks stay on disk until they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.devices import default_device
from coprune.base.errors import BadInput
from coprune.base.precision import SLOW_IN_BFLOAT16, multiplies_bfloat16
from coprune.base.progress import Reporter
from coprune.base.words import LeaveOut, Set, say
from coprune.model.bare_configuration import Imagined
from coprune.model.blocks import Block, find_blocks
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.load import TaskName, load_model, load_processor, task_of
from coprune.model.checkpoint.locate import GgufFile, Location, ModelFolder, holds_weights, locate
from coprune.model.checkpoint.mapped_gguf import LazyGguf
from coprune.model.checkpoint.names import counted_kinds
from coprune.model.checkpoint.source import Source
from coprune.model.checkpoint.weights import InMemory, Weights, bytes_in
from coprune.model.leftovers import NotLoaded
from coprune.model.room import require_room, room_on
from coprune.model.transformers_private import restore_own_layers
from coprune.model.walk.activations import GIB
from coprune.model.walk.block_calls import input_device
from coprune.recipe.parts import DtypeName, ModelPart
from coprune.recipe.recipe import Recipe
from coprune.recipe.structure import WHOLE_MODEL

_SHARE_FOR_WEIGHTS = 0.75
"""Maximum share of free memory for a model's weights while it is temporarily read whole."""


@dataclass
class Loaded:
    """A model that is ready to be walked, with its tokenizer or image processor and its origin."""

    weights: Weights
    processor: Any
    source: str
    quantised_source: bool

    @property
    def model(self) -> PreTrainedModel:
        return self.weights.model

    @property
    def task(self) -> TaskName:
        """The task of the model."""
        return task_of(self.model.config, type(self.model))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of a text model."""
        if self.task == "speech":
            return getattr(self.processor, "tokenizer", None)
        return self.processor if self.task != "images" else None

    @property
    def device(self) -> torch.device:
        """Device of token ids or images."""
        return self.weights.device if isinstance(self.weights, Imagined) else input_device(self.model)

    def lacks_room(self) -> str | None:
        """Return why the whole model cannot be read into memory temporarily; None if it can (or is there already)."""
        if not self.weights.streams:
            return None
        needed = sum(parameter.nbytes for parameter in self.model.parameters() if parameter.is_meta)
        available, where = room_on(self.device)
        # Computing needs memory too, and so may other programs.
        if available is None or needed <= available * _SHARE_FOR_WEIGHTS:
            return None
        return f"the whole model takes {needed / GIB:.1f} GiB {where}, too much of the {available / GIB:.1f} GiB that are free"

    @contextmanager
    def whole(self, reporter: Reporter) -> Iterator[PreTrainedModel]:
        """Hold the whole model in memory in the body, reading a streamed model's blocks."""
        if not self.weights.streams:
            yield self.model
            return
        names = [block.name for block in find_blocks(self.model)]
        try:
            with reporter.bar("Reading the whole model", len(names)) as advance:
                for name in names:
                    self.weights.acquire(name)
                    advance(1)
            yield self.model
        finally:
            for name in names:
                self.weights.release(name)

    @property
    def left_out(self) -> list[NotLoaded]:
        """Tensors of the checkpoint that the model does not load, by kind."""
        return [NotLoaded(kind, count) for kind, count in counted_kinds(self.weights.carried_entries)]

    def fingerprint(self, blocks: Sequence[Block]) -> str:
        """Hash every byte of the weights; 16 hex digits."""
        digest = hashlib.sha256(repr([(n, tuple(p.shape)) for n, p in self.model.named_parameters()]).encode())
        for name, tensor in sorted(self.weights.rest_tensors([block.name for block in blocks]).items()):
            digest.update(name.encode())
            digest.update(bytes_in(tensor))
        for block in blocks:
            for name, content in sorted(self.weights.digests(block.name).items()):
                digest.update(name.encode() + content)
        return digest.hexdigest()[:16]


def choose_device(name: str) -> torch.device:
    """Return an available device by name or `auto`. Raises BadInput if there is none."""
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("tensors have no values there")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # torch's message then lists two dozen device types
            reason = f"this machine has {default_device()}"
        fix = ("try ", Set("device", "auto"), " or ", Set("device", "cpu"))
        raise BadInput(
            f"the device {name!r} cannot be used here ({reason})", field="device", value=name, fix=fix
        ) from None
    return device


def streams(recipe: Recipe) -> bool:
    """Return whether a model's blocks stay on disk until the walk reaches them.

    Removal streams only on request. GGUF to GGUF always streams, since the new file copies the old one's bytes.
    """
    if recipe.remove.parts and not recipe.output.as_gguf:
        return recipe.model.stream is True
    needs = recipe.prune.reshapes or recipe.evaluate.runs_tasks or recipe.evaluate.answers.is_asked
    whole = needs or recipe.calibrate.is_own or recipe.prune.allocation.name in WHOLE_MODEL
    return recipe.model.stream is not False and not whole


def keeps_experts(recipe: Recipe) -> bool:
    """Return whether a recipe leaves the experts' matrices unchanged, apart from removing experts and blocks."""
    changed = recipe.sets_zeros or recipe.train.mode is not None or recipe.prune.reconstruct.steps
    changed = changed or (recipe.remove.maps_blocks and not recipe.output.as_gguf)
    return bool(recipe.remove.parts) and {*recipe.remove.kinds} <= {"experts", "blocks"} and not changed


def open_model(asked: ModelPart, stream: bool, experts_apart: bool = False) -> Loaded:
    """Open the model that a recipe names.

    Args:
        asked: the model.
        stream: whether the blocks of a folder stay on disk until they are needed.
        experts_apart: whether experts then stay on disk until they are multiplied, one at a time.
    """
    location = locate(asked.name, asked.cache_dir)
    device = choose_device(asked.device)
    if stream and isinstance(location, ModelFolder):
        lazy = LazyCheckpoint(location, asked.dtype, device, experts_apart=experts_apart)
        blocks = find_blocks(lazy.model)
        if asked.check_memory:
            require_room(location, len(blocks), device)
        lazy.acquire_rest([block.name for block in blocks])
        return Loaded(lazy, load_processor(location, task_of(lazy.model.config)), location.name, False)
    if stream and isinstance(location, GgufFile):
        mapped = LazyGguf(location, asked.dtype, device, experts_apart)
        mapped.acquire_rest([block.name for block in find_blocks(mapped.model)])
        return Loaded(mapped, load_processor(location, "text"), location.name, True)
    if isinstance(location, ModelFolder) and asked.check_memory:
        require_room(location, 1, device)
    model, processor = load_model(location, asked.dtype, device)
    return Loaded(in_memory(model, location, asked.dtype), processor, location.name, isinstance(location, GgufFile))


def in_memory(model: PreTrainedModel, location: Location, dtype: DtypeName = "auto") -> InMemory:
    """Wrap a loaded model, to be saved in its source's layout.

    dtype: the dtype it was loaded in.
    """
    return InMemory(model) if isinstance(location, GgufFile) else InMemory(model, Source(location, model, dtype))


def open_without_weights(asked: ModelPart) -> Loaded | None:
    """Open a model that has only a configuration, with its tokenizer if there is one.

    Args:
        asked: the model. For a Hub id, no weights are fetched.

    Returns:
        The model without weights; None if its weights are on this machine.

    Raises:
        BadInput: there is no such model, or transformers cannot build it from its configuration.
    """
    location = locate(asked.name, asked.cache_dir, weights=False)
    if not isinstance(location, ModelFolder) or holds_weights(location):
        return None
    return outline(location, asked)


def outline(location: ModelFolder, asked: ModelPart) -> Loaded:
    """Open a folder's model from its configuration alone, with its tokenizer or image processor if there is one."""
    imagined, processor = Imagined(location, asked.dtype, choose_device(asked.device)), None
    with suppress(BadInput):
        processor = load_processor(location, task_of(imagined.model.config))
    return Loaded(imagined, processor, location.name, False)


def say_of_bfloat16(reporter: Reporter, loaded: Loaded, by_name: bool = True, more: str = "") -> None:
    """Report once that a CPU is slow in bfloat16.

    Args:
        reporter: prints it.
        loaded: the model.
        by_name: whether coprune loaded it, so that it can load it in another precision.
        more: other effects of another precision, as the rest of the sentence.
    """
    if loaded.model.dtype == torch.bfloat16 and not multiplies_bfloat16(loaded.device):
        other = Set("dtype", "float32") if by_name else "float32"
        reporter.say_once(say((f"{SLOW_IN_BFLOAT16} ", other, f" computes several times as fast{more}.")))


def handed_over_model(model: PreTrainedModel, processor: Any) -> Loaded:
    """Wrap a model that a caller passed. Raises BadInput for a processor's name: a model in memory needs the object."""
    if isinstance(processor, str | Path):
        wrong = f"a processor is a tokenizer or an image processor, but {str(processor)!r} is a name"
        fix = "load it first, as with AutoTokenizer.from_pretrained"
        raise BadInput(wrong, field="processor", value=processor, fix=fix)
    restore_own_layers(model)
    return Loaded(InMemory(model), processor, model.name_or_path or type(model).__name__, False)


def refuse_what_loading_decides(settings: Mapping[str, Any]) -> None:
    """Raise BadInput for settings that a model in memory has already fixed."""
    for name in ("dtype", "device", "cache_dir"):
        if settings.get(name) not in (None, "auto"):
            raise BadInput(
                f"{name} is about loading, but the model is already in memory",
                field=name,
                value=settings[name],
                fix=(LeaveOut(name), ", or convert the model itself"),
            )
