"""The device `sim`, registered for the whole process by importing this module; never in the process of the tests.

SIM_LIMIT limits its memory in bytes, SIM_DEVICES sets the number of devices.
"""

from __future__ import annotations

import ctypes
import os
import types
from typing import Any

import torch  # before the library, which needs PyTorch's
from torch.utils import backend_registration

from support.simdevice import SIMULATED as NAME
from support.simdevice.compile_device import load_library

library = load_library()


def _declare() -> None:
    library.sim_count.argtypes = [ctypes.c_int, ctypes.c_char_p]
    library.sim_counts.restype = ctypes.c_char_p
    library.sim_limit.argtypes = [ctypes.c_long]
    for name in ("sim_allocated", "sim_peak", "sim_launches"):
        getattr(library, name).restype = ctypes.c_long
    library.sim_limit(int(os.environ.get("SIM_LIMIT", "0")))
    library.sim_set_devices(int(os.environ.get("SIM_DEVICES", "1")))


def index_of(device: Any = None) -> int:
    """Return the index of a device in any notation; of the current one for None."""
    device = torch.device(device) if isinstance(device, str) else device
    index = device.index if isinstance(device, torch.device) else device
    return int(library.sim_current() if index is None else index)


class _Current:
    """A context in which a device is the current one."""

    def __init__(self, device: Any) -> None:
        self.index = index_of(device)

    def __enter__(self) -> None:
        self.before = library.sim_current()
        library.sim_set_current(self.index)

    def __exit__(self, *_: object) -> None:
        library.sim_set_current(self.before)


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing, since device operations are already complete."""


def _module() -> types.ModuleType:
    """Return the module `torch.sim`, like `torch.cuda`."""
    has: dict[str, Any] = {
        "is_available": lambda: library.sim_devices() > 0,
        "is_initialized": lambda: True,
        "device_count": library.sim_devices,
        "current_device": library.sim_current,
        "set_device": lambda device: library.sim_set_current(index_of(device)),
        "device": _Current,
        "get_device_name": lambda device=None: "Simulated device",
        "memory_allocated": lambda device=None: library.sim_allocated(index_of(device)),
        "max_memory_allocated": lambda device=None: library.sim_peak(index_of(device)),
        "reset_peak_memory_stats": lambda device=None: library.sim_reset_peak(index_of(device)),
        "mem_get_info": lambda device=None: torch.accelerator.get_memory_info(device),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "is_bf16_supported": lambda *_, **__: True,
        "_is_in_bad_fork": lambda: False,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        **dict.fromkeys(("synchronize", "empty_cache", "manual_seed", "manual_seed_all"), _nothing),
        **dict.fromkeys(("set_rng_state", "set_rng_state_all"), _nothing),
    }
    module = types.ModuleType(f"torch.{NAME}")
    vars(module).update(has)
    return module


def _register() -> None:
    _declare()
    backend_registration.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    backend_registration.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    # Module.to keeps parameters' identity, and so their ties, between CPU and CUDA; for other backends only by swapping.
    torch.__future__.set_swap_module_params_on_conversion(True)


_register()
