"""Check that a model's weights fit in memory, before any is read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from coprune.base.devices import DeviceMemory, device_memory, in_host_memory
from coprune.base.errors import BadInput
from coprune.base.memory import available_bytes
from coprune.base.words import Set, Words
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.source_encoding import checkpoint_entries
from coprune.model.walk.activations import GIB


def require_room(
    location: ModelFolder,
    parts: int,
    device: torch.device,
    memory: Callable[[torch.device], DeviceMemory | None] = device_memory,
) -> None:
    """Raise BadInput if a folder's weights alone do not fit in the device's memory.

    Args:
        location: the folder.
        parts: number of blocks of a streamed model, which holds one at a time; 1 for a loaded model.
        device: their target; host memory then holds one tensor at a time.
        memory: reads a device's memory.
    """
    needed = sum(entry.nbytes for entry in checkpoint_entries(location.path).values()) // parts
    available, where = room_on(device, memory)
    if available is None or needed <= available:
        return
    larger: Words = "use a larger machine" if in_host_memory(device) else ("compute with ", Set("device", "cpu"))
    first: Words = ("read them block by block with ", Set("stream", True)) if parts == 1 else larger
    raise BadInput(
        f"the weights of {location.name} take {needed / GIB:.1f} GiB {where} at a time, but only {available / GIB:.1f} are free",
        field="model",
        value=location.name,
        fix=(
            *(first if isinstance(first, tuple) else (first,)),
            ", or skip this check with ",
            Set("check_memory", False),
        ),
    )


def room_on(
    device: torch.device, memory: Callable[[torch.device], DeviceMemory | None] = device_memory
) -> tuple[int | None, str]:
    """Return the free bytes for a device's tensors (None if unknown), and the name of that memory."""
    if in_host_memory(device):
        return available_bytes(), "of memory"
    there = memory(device)
    return None if there is None else there.available, f"on {device}"
