"""Properties of devices, queried in one place. `base/kernels` has the table of kernels per device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from coprune.base.errors import OutOfMemory
from coprune.base.words import Words

Kind = Literal["cpu", "cuda", "other"]
# Messages of torch's allocators, and of NVIDIA's libraries, which allocate on their own.
_NO_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


def kind_of(device: torch.device) -> Kind:
    """Return the kind of a device, by which kernels are chosen."""
    if device.type == "cpu":
        return "cpu"
    return "cuda" if device.type == "cuda" else "other"


def in_host_memory(device: torch.device) -> bool:
    """Return whether the host can address tensors on the device."""
    return device.type == "cpu"


class PerMemory(NamedTuple):
    """An amount of work per batch, in host memory and on a GPU."""

    host: int
    gpu: int

    def on(self, device: torch.device) -> int:
        """Return the value for a device."""
        return self.host if in_host_memory(device) else self.gpu


def accelerator() -> torch.device | None:
    """Return the kind of GPU that torch finds, without a number; None without a supported one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    # Apple's lack float64, in which errors are summed.
    return None if found is None or found.type == "mps" else found


def accelerators() -> int:
    """Return the number of accelerators."""
    return 0 if accelerator() is None else torch.accelerator.device_count()


def default_device() -> torch.device:
    """Return a GPU if there is one, else the CPU."""
    return accelerator() or torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Synchronise the device, for example before timing."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def buffer_for(tensor: torch.Tensor) -> torch.Tensor:
    """Allocate host memory of a tensor's shape and dtype, pinned if it is on an accelerator, for fast asynchronous copies."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_accelerator(tensor.device))


def buffer_size(nbytes: int, device: torch.device) -> int:
    """Return the bytes of a buffer: torch allocates pinned memory in powers of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes and is_accelerator(device) else nbytes


def is_accelerator(device: torch.device) -> bool:
    """Return whether a device is torch's accelerator, with streams and pinned memory."""
    found = accelerator()
    return found is not None and found.type == device.type


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU; (0, 0) for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def describe(device: torch.device) -> str:
    """Return a GPU's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device, in bytes."""

    name: str
    """Name of the device: `cuda:0`."""
    allocated: int
    """Bytes of this process's tensors now."""
    peak: int
    """Peak bytes of its tensors since `reset_peak`."""
    available: int | None
    """Memory still available to this process; None if the device does not report it."""


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Return the memory of a device; None for host memory, or if the device's module reports nothing."""
    module = _module_of(device)
    if module is None or not hasattr(module, "memory_allocated"):
        return None
    allocated, available = int(module.memory_allocated(device)), None
    if hasattr(module, "mem_get_info"):
        # Memory that the allocator caches is available, though the device counts it as used.
        kept = int(module.memory_reserved(device)) - allocated if hasattr(module, "memory_reserved") else 0
        available = int(module.mem_get_info(device)[0]) + kept
    peak = int(module.max_memory_allocated(device)) if hasattr(module, "max_memory_allocated") else allocated
    return DeviceMemory(str(device), allocated, peak, available)


def reset_peak(device: torch.device) -> None:
    """Reset a device's peak memory counter."""
    module = _module_of(device)
    if module is not None and hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)


def launching_at(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels launched by hand go to a tensor's GPU rather than to the current one."""
    return torch.cuda.device_of(tensor)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch or Python means that a device or the host is out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # Torch's allocators for the host and Apple's GPUs have no error types of their own.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@contextmanager
def memory_within(place: Callable[[], str]) -> Iterator[None]:
    """Name the place where memory ran out, unless the error already does. place: returns the run's current place."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(first_line_of(error)).within(place()) from None


@contextmanager
def enough_memory(fix: Words, stage: Callable[[], str] | None = None) -> Iterator[None]:
    """Replace an out-of-memory error by one message. fix: settings that need less; stage: returns the current step."""
    try:
        yield
        return
    except OutOfMemory as error:
        found = error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        found = OutOfMemory(first_line_of(error))
    raise (found if stage is None else found.within(stage())).advised(fix) from None


def first_line_of(error: BaseException) -> str:
    """Return the first line of an out-of-memory error, without torch's advice on its allocator."""
    said = (str(error) or "there is no memory left").splitlines()[0]
    return said.partition(" If reserved but unallocated")[0].rstrip(". ")


def _module_of(device: torch.device) -> Any:
    """Return torch's module for a kind of device (`torch.cuda`), or None for host memory and kinds without one."""
    return None if in_host_memory(device) else getattr(torch, device.type, None)
