"""Training on the device that was asked for, and on no other.

transformers takes the first GPU, whichever was asked for, and where there are several spreads every batch over all of them
(`DataParallel`). Several processes get a GPU each from their launcher, and are left to it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from coprune.base.devices import accelerator, in_host_memory, is_accelerator
from coprune.base.environment import accelerate_told, local_rank, world_size
from coprune.model.opened import choose_device


def training_device(name: str) -> torch.device:
    """The device that this process trains on. name: `auto`, or a device's; raises BadInput if that is not there."""
    found = accelerator()
    if found is not None and name in ("auto", found.type):
        return torch.device(found.type, local_rank())
    return choose_device(name)


class OneDeviceArguments(TrainingArguments):
    """transformers' settings of a training on one device."""

    _taken: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """The device that was taken; asked for first, transformers and accelerate set up what they need."""
        chosen = super().device
        return self._taken or chosen

    @property
    def n_gpu(self) -> int:
        """GPUs of this process, of which more than one would be used."""
        found: int = super().n_gpu
        return min(1, found)


def arguments_on(device: torch.device, **settings: Any) -> OneDeviceArguments:
    """Settings of a training on a device. settings: those of `TrainingArguments`, but for the device."""
    settings |= {"use_cpu": in_host_memory(device), "dataloader_pin_memory": is_accelerator(device)}
    if world_size() > 1:
        return OneDeviceArguments(**settings)
    with accelerate_told(str(device)):
        arguments = OneDeviceArguments(**settings)
        arguments._taken = device
        # Asked now, while accelerate is told.
        if is_accelerator(arguments.device) and device.index is not None:
            torch.accelerator.set_device_index(device.index)
    return arguments
