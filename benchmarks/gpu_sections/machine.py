"""Measured speeds of the GPU and its host: copies, launches, waits, products. Ends with the options for `gpu_estimate.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from coprune.base.devices import capability, describe, device_memory, synchronize
from coprune.base.precision import full_float32
from coprune.pruning.linear_algebra import factor_inverse
from gpu_sections.section import Asked, Result, head, mib, middle, row

REPEATS = 5


def measure(asked: Asked) -> Result:
    """Print the hardware and its measured speeds."""
    device = torch.device(asked.device)
    size = 64 if asked.tiny else 8192
    there = device_memory(torch.empty(1, device=device).device)
    print(f"{describe(device)}, compute capability {'.'.join(map(str, capability(device)))}, "
          f"{mib(there.available if there else None)} MiB free, CUDA {torch.version.cuda}, {cores()} cores\n")  # fmt: skip
    head(" ", "reached", " unit")
    reached = {
        "bf16_tflops": 2e-12 * size**3 / product(device, size, torch.bfloat16),
        "float32_tflops": 2e-12 * size**3 / product(device, size, torch.float32),
        "factor_tflops": 1e-12 * (size // 2) ** 3 / factoring(device, size // 2),
        "memory_gbs": 12e-9 * size**2 / adding(device, size),
        **copying(device, size),
        "launch_us": 1e6 * launching(device),
        "wait_us": 1e6 * waiting(device),
    }
    for name, value in reached.items():
        kind = name.rpartition("_")[2]
        row(name.rpartition("_")[0], f"{value:.1f}", {"tflops": "TFLOP/s", "gbs": "GB/s", "us": "µs"}[kind])
    options = " ".join(f"--{name.replace('_', '-')} {value:.3g}" for name, value in reached.items())
    print(f"\n`python benchmarks/gpu_estimate.py {options}`")
    return True, f"{reached['bf16_tflops']:.0f} TFLOP/s in bfloat16, {reached['launch_us']:.1f} µs a launch"


def cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def seconds_of(device: torch.device, work: Callable[[], Any], times: int = 1) -> float:
    """Median seconds of some work on the device."""
    work()
    found = []
    for _ in range(REPEATS):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(times):
            work()
        synchronize(device)
        found.append((time.perf_counter() - started) / times)
    return middle(found)


def product(device: torch.device, size: int, dtype: torch.dtype) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    with full_float32():
        return seconds_of(device, lambda: a @ a)


def factoring(device: torch.device, size: int) -> float:
    a = torch.randn(2 * size, size, device=device)
    gram = a.T @ a / len(a)
    return seconds_of(device, lambda: factor_inverse(gram, 0.01))


def adding(device: torch.device, size: int) -> float:
    a, b, c = (torch.zeros(size, size, device=device) for _ in range(3))
    return seconds_of(device, lambda: torch.add(a, b, out=c))


def copying(device: torch.device, size: int) -> dict[str, float]:
    """GB per second, in the slower of both directions."""
    there = torch.zeros(size, size, device=device)
    pinned = torch.zeros(size, size, pin_memory=device.type == "cuda")
    found = {}
    for name, here in (("pinned", pinned), ("pageable", torch.zeros(size, size))):
        both = [
            seconds_of(device, lambda to=to, source=source: to.copy_(source))  # type: ignore[misc]
            for to, source in ((there, here), (here, there))
        ]
        found[f"{name}_gbs"] = 4e-9 * size**2 / max(both)
    return found


def launching(device: torch.device) -> float:
    a = torch.zeros(64, device=device)
    return seconds_of(device, lambda: a.add_(1), 1000)


def waiting(device: torch.device) -> float:
    a = torch.zeros((), device=device)
    return seconds_of(device, lambda: a.item(), 100)
