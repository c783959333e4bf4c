"""Memory on large pages for packed matrices, where Linux has them.

Decoding reads every weight once, in order, and address look-ups every 4 KiB slow it down, most in a virtual machine.
Matrices follow each other in one region, so that small ones share a page.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading

import torch
from torch import Tensor

PAGE = 2 << 20
REGION = 32 << 20  # untouched pages of it take no memory
ALIGNMENT = 64
_MADV_PAGEOUT = 21  # Python's mmap does not name it

_lock = threading.Lock()
_region: tuple[mmap.mmap, int] | None = None  # the one being filled, and where it is free


def on_large_pages(blob: Tensor) -> Tensor:
    """Copy bytes to large pages, to be used instead of them.

    A region of pages goes back to the system when the last tensor in it is gone.

    Args:
        blob: one-dimensional uint8 on the CPU.

    Returns:
        The copy, which begins at a multiple of 64 bytes; the tensor itself where the system has no large pages.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return blob
    with torch.inference_mode(False):  # a tensor made within that mode could not be changed outside of it
        copy = _take(blob.numel())
        copy.copy_(blob.clone() if blob.is_inference() else blob)
    page_out(blob)
    return copy


def page_out(blob: Tensor) -> None:
    """Take bytes that will hardly be read again out of memory; they stay what they are.

    A tensor from a safetensors file is a part of the mapped file, and as long as one tensor of that file is in use, the
    pages of all that were read count as this process's memory.
    """
    start = -(-blob.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (blob.data_ptr() + blob.numel()) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and end > start:
        # Older kernels ignore this advice.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def _take(size: int) -> Tensor:
    global _region
    with _lock:
        if _region is None or _region[1] + size > len(_region[0]):
            _region = _new_region(max(size, REGION))
        memory, start = _region
        _region = memory, start + -(-size // ALIGNMENT) * ALIGNMENT
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)


def _new_region(size: int) -> tuple[mmap.mmap, int]:
    """Map memory, and return it with the offset of its first large page."""
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
