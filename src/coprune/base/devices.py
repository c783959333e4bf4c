"""What is asked about devices, in one place. Which kernel serves which device is the table of `base/kernels`."""

from __future__ import annotations

from typing import Literal

import torch

Kind = Literal["cpu", "cuda", "other"]


def kind_of(device: torch.device) -> Kind:
    """The kind of a device as kernels tell them apart."""
    if device.type == "cpu":
        return "cpu"
    return "cuda" if device.type == "cuda" else "other"


def in_host_memory(device: torch.device) -> bool:
    """Whether tensors on the device are memory that this process can address."""
    return device.type == "cpu"


def default_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told, so that a clock that is read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; (0, 0) for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def describe(device: torch.device) -> str:
    """A GPU's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
