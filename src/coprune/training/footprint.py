"""Memory for training a whole model, from the shapes of its weights; imports no training code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from coprune.base.devices import DeviceMemory, device_memory
from coprune.base.errors import BadInput
from coprune.base.words import Set, Together
from coprune.model.bare_configuration import Imagined
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.locate import GgufFile, Location, holds_weights
from coprune.model.checkpoint.source_encoding import checkpoint_entries
from coprune.model.room import room_on
from coprune.model.walk.activations import GIB
from coprune.recipe.train_part import LEARNING_RATES

# A weight and its gradient in float32, and the two moments of the optimiser.
TRAINED_BYTES = 16
_HELD_BYTES = 4
"""Bytes of a frozen weight, which is float32 like the trained ones."""


def training_bytes(sizes: Iterable[tuple[str, int]], scope: str) -> int:
    """Return the bytes of a model's weights in training, with gradients and moments.

    Args:
        sizes: names of its tensors and their numbers of weights.
        scope: of the training, as in its settings. Tensors with a number in their name belong to a block; routers are
            too small to count.
    """
    needed = 0
    for name, size in sizes:
        trained = scope == "all" or (scope == "blocks" and any(map(str.isdigit, name.split("."))))
        needed += size * (TRAINED_BYTES if trained else _HELD_BYTES)
    return needed


def require_room_to_train(
    location: Location,
    scope: str,
    distills: bool,
    device: torch.device,
    memory: Callable[[torch.device], DeviceMemory | None] = device_memory,
) -> None:
    """Raise BadInput if a device has too little memory to train a model's weights.

    Activations are not counted, so a training that passes may still run out of memory.

    Args:
        location: the model to prune and train; in distillation also the teacher.
        scope: of the training, as in its settings.
        distills: whether the dense model is in memory as well.
        device: of the training.
        memory: reads a device's memory.
    """
    sizes, stored = _sizes(location)
    needed = training_bytes(sizes, scope) + (stored if distills else 0)
    available, where = room_on(device, memory)
    if available is None or needed <= available:
        return
    what = "all weights" if scope == "all" else f"the {scope}"
    raise BadInput(
        f"training {what} of {location.name} takes at least {needed / GIB:.1f} GiB {where}, and "
        f"{available / GIB:.1f} are available",
        field="finetune",
        fix=(
            "use ",
            Together((Set("preset", "best"), Set("train", "blocks"))),
            " or ",
            Together(
                (
                    Set("finetune", "lora-distill"),
                    Set("finetune_lr", LEARNING_RATES["lora-distill"]),
                    Set("finetune_rates", "absolute"),
                )
            )
            if distills
            else Set("finetune", "lora"),
            ", or skip this check with ",
            Set("check_memory", False),
        ),
    )


def _sizes(location: Location) -> tuple[list[tuple[str, int]], int]:
    """Return the number of weights of each tensor of a model, and the bytes of all tensors once loaded."""
    if isinstance(location, GgufFile):
        sizes = [(t.name, int(t.n_elements)) for t in gguf_reader(location.path, field="model").tensors]
        return sizes, 4 * sum(size for _, size in sizes)  # decoded to float32
    if not holds_weights(location):
        imagined = Imagined(location, "auto", torch.device("cpu"))
        return [(name, one.numel()) for name, one in imagined.model.named_parameters()], imagined.total_bytes
    entries = checkpoint_entries(location.path)
    return [(name, math.prod(e.shape)) for name, e in entries.items()], sum(e.nbytes for e in entries.values())
