"""The precision of products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from coprune.base.devices import capability, in_host_memory

_TILE = 1 << 20
"""Entries that are copied at a time: 8 MiB in float64."""
_HELD = {torch.float32, torch.bfloat16}
SLOW_IN_BFLOAT16 = "This processor multiplies bfloat16 numbers slowly."


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products in true float32 (no TF32, no bfloat16 passes) and without autograd, in statistics and solvers."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.no_grad():
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def held_in_float32(module: nn.Module) -> Iterator[None]:
    """Hold parameters and buffers in float32 in the body; small updates would vanish in half precision."""
    tensors = [tensor for tensor in [*module.parameters(), *module.buffers()] if tensor.is_floating_point()]
    dtypes = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(torch.float32)
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


@contextmanager
def held_in_bfloat16(module: nn.Module) -> Iterator[None]:
    """Hold float32 parameters in bfloat16 in the body, and compute in it, unless some stay in their files or are quantised.

    Buffers stay in float32, since positions need precision.
    """
    plain = all(type(one.data) is Tensor and one.dtype in _HELD for one in module.parameters())
    originals = [(one, one.data) for one in module.parameters() if plain and one.dtype == torch.float32]
    try:
        for parameter, original in originals:
            parameter.data = original.to(torch.bfloat16)
        yield
    finally:
        for parameter, original in originals:
            parameter.data = original


def total(values: Tensor) -> Tensor:
    """Return the sum of all entries, added up in float64.

    torch copies what it adds in another type. A CPU adds tiles whose copies stay in its cache: 2,048 × 5,632 entries take a
    tenth of the time that one copy of all of them takes.

    Args:
        values: R × C, float32.

    Returns:
        A scalar, float64, on the same device.
    """
    if not in_host_memory(values.device):
        return values.sum(dtype=torch.float64)
    rows = max(1, _TILE // max(1, values.shape[1]))
    return torch.stack([tile.sum(dtype=torch.float64) for tile in values.split(rows)]).sum()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16 at least as fast as in float32.

    A processor without such instructions takes 2 (AVX-512) to 200 (AVX2) times as long.
    """
    if in_host_memory(device):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type != "cuda" or capability(device) >= (8, 0)


def quickest_on_cpu() -> Literal["float32", "bfloat16"]:
    """Return the name of the dtype in which a model runs fastest on this processor."""
    return "bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32"


def precision_on(device: torch.device, asked: Literal["float32", "bfloat16"]) -> torch.dtype:
    """Return the dtype to compute in: bfloat16 if asked for and fast on the device, else float32."""
    return torch.bfloat16 if asked == "bfloat16" and multiplies_bfloat16(device) else torch.float32
