"""The table of kernels by operation and device, and the choice from it.

All kernels of an operation have the same signature and give the same results up to rounding; the operation's file
describes them. A new kernel is a function there and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch

from coprune.base.devices import Kind, kind_of
from coprune.base.errors import BadInput
from coprune.base.kernels import columns, gram, ranks, shifted
from coprune.base.native import compilation

Operation = Literal["walk_columns", "add_to_gram", "panel_size", "find_smallest", "shifted_inverses"]


def always() -> bool:
    return True


def native_is_there() -> bool:
    return compilation.load_kernels() is not None


@cache
def triton_is_there() -> bool:
    """Return whether Triton is installed; cached, since the search takes longer than a small product."""
    return find_spec("triton") is not None


def nvidia_is_there() -> bool:
    """Return whether torch's `cuda` means NVIDIA; it covers AMD's GPUs too."""
    return torch.version.cuda is not None


def walk_with_triton(block: columns.ColumnBlock) -> None:
    """Update the columns with one launch of a Triton kernel, imported on first use."""
    from coprune.base.kernels.columns_triton import walk_columns

    walk_columns(block)


class Kernel(NamedTuple):
    """One implementation of an operation."""

    name: str
    run: Callable[..., Any]
    there: Callable[[], bool] = always
    """Returns whether this machine can run the kernel."""


KERNELS: dict[tuple[Operation, Kind], tuple[Kernel, ...]] = {
    ("walk_columns", "cpu"): (
        Kernel("native", columns.walk_natively, native_is_there),
        Kernel("torch", columns.walk_with_torch),
        Kernel("triton", walk_with_triton, triton_is_there),  # in its interpreter
    ),
    ("walk_columns", "cuda"): (
        # Proves itself on every device before it is used.
        Kernel("triton", walk_with_triton, triton_is_there),
        Kernel("torch", columns.walk_with_torch),
    ),
    ("walk_columns", "other"): (Kernel("torch", columns.walk_with_torch),),
    ("add_to_gram", "cpu"): (
        Kernel("native", gram.add_natively, native_is_there),
        Kernel("torch", gram.add_with_torch),
    ),
    ("add_to_gram", "cuda"): (
        Kernel("tensor cores", gram.add_on_tensor_cores, nvidia_is_there),
        Kernel("torch", gram.add_with_torch),
    ),
    ("add_to_gram", "other"): (Kernel("torch", gram.add_with_torch),),
    ("panel_size", "cpu"): (Kernel("torch", gram.panel_for_caches),),
    ("panel_size", "cuda"): (Kernel("torch", gram.panel_for_devices),),
    ("panel_size", "other"): (Kernel("torch", gram.panel_for_devices),),
    ("find_smallest", "cpu"): (Kernel("numpy", ranks.by_partition),),
    ("find_smallest", "cuda"): (Kernel("torch", ranks.by_kth_value),),
    ("find_smallest", "other"): (Kernel("torch", ranks.by_kth_value),),
    ("shifted_inverses", "cpu"): (Kernel("eigenvalues", shifted.by_eigenvalues),),
    ("shifted_inverses", "cuda"): (Kernel("factors", shifted.by_factors),),
    ("shifted_inverses", "other"): (Kernel("factors", shifted.by_factors),),
}
"""Kernels by operation and kind of device, preferred ones first."""


def kernel(operation: Operation, device: torch.device, name: str = "auto") -> Callable[..., Any]:
    """Choose the kernel of an operation.

    Args:
        operation: the operation's name.
        device: where its tensors are.
        name: a kernel, or auto for the first one available.

    Raises:
        BadInput: this device has no kernel of that name.
    """
    for found in KERNELS[operation, kind_of(device)]:
        if name in ("auto", found.name) and found.there():
            return found.run
    raise BadInput(f"the kernel {name!r} does not support {operation} on {str(device)!r} on this machine")
