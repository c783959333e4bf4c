"""Calls of the native kernels that statistics and solvers use, with tensors on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from coprune.base.native.compilation import load_kernels

TOKENS = 512
"""Number of inputs of a Gram matrix rearranged together, so that they stay in the second-level cache."""


class _ColumnBlock(ctypes.Structure):
    """`struct ColumnBlock` of solving.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("columns", "keep", "errors", "unit", "pivots")),
        *((name, ctypes.c_int64) for name in ("size", "outputs", "down", "right", "n", "m")),
    )


class _Tokens(ctypes.Structure):
    """`struct Tokens` of solving.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "pairs", "gram")),
        *((name, ctypes.c_int64) for name in ("tokens", "width", "stride", "panel")),
    )


def update_columns(tensors: Sequence[Tensor], group: tuple[int, int]) -> None:
    """Update one block of SparseGPT's columns (arXiv 2301.00774) in place: see `ColumnBlock`.

    Args:
        tensors: its columns, keep, errors, unit and pivots.
        group: N and M, or zeros if the mask is given.
    """
    library = load_kernels()
    assert library is not None
    pointers = [tensor.data_ptr() for tensor in tensors]
    columns, unit = tensors[0], tensors[3]
    block = _ColumnBlock(*pointers, *columns.shape, *unit.stride(), *group)
    if library.coprune_update_columns(ctypes.byref(block), torch.get_num_threads()):
        raise MemoryError("not enough memory for a block of columns")


def add_to_gram(gram: Tensor, x: Tensor, panel: int) -> bool:
    """Add XᵀX of bfloat16 inputs, summed in float32.

    Args:
        gram: I × I float32, contiguous, on the CPU.
        x: T × I.
        panel: number of rows per panel; elements left of a panel are not changed.

    Returns:
        Whether a kernel was available.
    """
    if x.dtype != torch.bfloat16 or (library := load_kernels()) is None:
        return False
    words: int = library.coprune_gram_scratch(min(TOKENS, x.shape[0]), x.shape[1])
    if words == 0:
        return False
    x = x if x.stride(1) == 1 else x.contiguous()
    scratch = torch.empty(words, dtype=torch.int32)
    for part in torch.split(x, TOKENS):
        tokens = _Tokens(part.data_ptr(), scratch.data_ptr(), gram.data_ptr(), *part.shape, part.stride(0), panel)
        library.coprune_gram(ctypes.byref(tokens), torch.get_num_threads())
    return True
