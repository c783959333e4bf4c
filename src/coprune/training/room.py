"""Whether a training of all weights has room, told before a run prunes for hours: a lower bound, from counts alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from coprune.base.devices import DeviceMemory, device_memory
from coprune.base.errors import BadInput
from coprune.base.words import Set, Together
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.locate import GgufFile, Location, holds_weights
from coprune.model.checkpoint.shards import checkpoint_entries
from coprune.model.imagined import Imagined
from coprune.model.room import room_on
from coprune.model.walk.activations import GIB
from coprune.recipe.finetune import LEARNING_RATES

# A weight and its gradient in float32, and the moments of the optimiser.
TRAINED_BYTES = {"adamw": 16, "sgd": 12, "adafactor": 8}
_HELD_BYTES = 4
"""A weight that is not trained, in float32 beside those that are."""


def require_room_to_train(
    location: Location,
    optimizer: str,
    scope: str,
    distills: bool,
    device: torch.device,
    memory: Callable[[torch.device], DeviceMemory | None] = device_memory,
) -> None:
    """Raise BadInput if a model's weights could not all be trained in the memory of a device.

    Activations are not counted, so a training that passes may still not fit.

    Args:
        location: the model that is to be pruned and then trained, and the teacher of a distillation.
        optimizer: as the settings of a fine-tuning name it.
        scope: what is trained, as they name it, too. No model is loaded yet: numbers in names tell what is in a block.
        distills: whether the dense model lies beside the trained one.
        device: where both go.
        memory: reads a device's memory.
    """
    sizes, stored = _sizes(location)
    needed = training_bytes(sizes, optimizer, scope) + (stored if distills else 0)
    available, where = room_on(device, memory)
    if available is None or needed <= available:
        return
    what = "all weights" if scope == "all" else "the blocks"
    raise BadInput(
        f"training {what} of {location.name} takes {needed / GIB:.1f} GiB {where} at least, and "
        f"{available / GIB:.1f} are there",
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
            ", or try it all the same with ",
            Set("check_memory", False),
        ),
    )


def training_bytes(sizes: Iterable[tuple[str, int]], optimizer: str, scope: str) -> int:
    """Return what a model's weights take while they are trained, with gradients and moments.

    Args:
        sizes: names of its tensors, and how many weights each has.
        optimizer: as the settings of a fine-tuning name it.
        scope: likewise; what is in a block is told by numbers in names.
    """
    needed = 0
    for name, size in sizes:
        trained = scope == "all" or any(map(str.isdigit, name.split(".")))
        needed += size * (TRAINED_BYTES[optimizer] if trained else _HELD_BYTES)
    return needed


def _sizes(location: Location) -> tuple[list[tuple[str, int]], int]:
    """How many weights the tensors of a model have, by their names, and the bytes of all of them once loaded."""
    if isinstance(location, GgufFile):
        sizes = [(t.name, int(t.n_elements)) for t in gguf_reader(location.path, field="model").tensors]
        return sizes, 4 * sum(size for _, size in sizes)  # decoded to float32
    if not holds_weights(location):
        imagined = Imagined(location, "auto", torch.device("cpu"))
        return [(name, one.numel()) for name, one in imagined.model.named_parameters()], imagined.total_bytes
    entries = checkpoint_entries(location.path)
    return [(name, math.prod(e.shape)) for name, e in entries.items()], sum(e.nbytes for e in entries.values())
