"""The operation `packed_product`: prepare a packed matrix for products.

(blob, starts, places, bias) → an object that multiplies, or None where the matrix has to be unpacked for every product. The
kernels read kept values and bitmask as in the file, plus the number of values before each row. Up to `IN_KERNEL` inputs are
multiplied from the packed weights; more are bound by arithmetic, so rows are unpacked tile by tile for PyTorch's product.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from coprune.base.errors import BadInput
from coprune.base.native.build import MatrixStruct, load_kernels
from coprune.base.pages import on_large_pages

IN_KERNEL = {torch.float32: 64, torch.bfloat16: 12}  # inputs; measured where the tiles begin to win
TILE_BYTES = 16 << 20
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


class Places(Protocol):
    """Shape, dtype and byte offsets of a packed matrix: the part of its header that a product needs."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def kept(self) -> int: ...

    @property
    def pattern_at(self) -> int: ...

    @property
    def values_at(self) -> int: ...


class NativeMatrix:
    """Pointers into one packed matrix, with their owners kept alive."""

    def __init__(self, blob: Tensor, starts: Tensor, places: Places, bias: Tensor | None, library: ctypes.CDLL) -> None:
        """Take the pointers.

        Args:
            blob: packed in the bitmask layout, one-dimensional uint8 on the CPU, checked.
            starts: O + 1 int64, how many values come before each row. Kernels trust them.
            places: what its header says.
            bias: O values of its dtype, contiguous.
            library: the compiled kernels.

        Raises:
            BadInput: the bias or the starts have another length.
        """
        if bias is not None and bias.numel() != places.shape[0]:
            raise BadInput(f"damaged packed matrix: {bias.numel()} values of a bias for {places.shape[0]} outputs")
        if starts.numel() != places.shape[0] + 1:
            raise BadInput(f"damaged packed matrix: {starts.numel()} starts of rows for {places.shape[0]} outputs")
        self.blob, self.starts, self.bias = blob, starts, bias
        self.rows, self.columns = places.shape
        self.dtype, self.bytes = places.dtype, places.dtype.itemsize
        self.struct = matrix_at(blob.data_ptr(), starts.data_ptr(), None if bias is None else bias.data_ptr(), places)
        self.address = ctypes.addressof(self.struct)
        self.library = library

    def product(self, x: Tensor) -> Tensor:
        """Multiply … × I to … × O, in the faster way for the number of inputs. x: of the weights' dtype, on the CPU."""
        batch = x.numel() // self.columns
        if batch <= IN_KERNEL[self.dtype]:
            return self.multiply(x.contiguous(), batch)
        return self.multiply_by_tiles(x, batch)

    def multiply(self, x: Tensor, batch: int) -> Tensor:
        """Multiply … × I to … × O in the kernel. x: contiguous, of the weights' dtype, with `batch` rows in all."""
        return multiply_at(self.address, x, self.rows, batch)

    def multiply_by_tiles(self, x: Tensor, batch: int) -> Tensor:
        """Multiply many inputs: unpack some rows, multiply them as a dense matrix, and so on."""
        x_TI = x.reshape(batch, self.columns)
        tile_rows = max(min(TILE_BYTES // (self.columns * self.bytes), self.rows), 1)
        tile = _scratch(tile_rows * self.columns, x.dtype).view(tile_rows, self.columns)
        parts = []
        for first in range(0, self.rows, tile_rows):
            last = min(first + tile_rows, self.rows)
            self.expand(tile, first, last)
            bias = None if self.bias is None else self.bias[first:last]
            parts.append(functional.linear(x_TI, tile[: last - first], bias))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).reshape(*x.shape[:-1], self.rows)

    def expand(self, out: Tensor, first: int, last: int) -> None:
        """Write rows first … last − 1 into out (at least that many rows × I, contiguous)."""
        pointer, threads = out.data_ptr(), torch.get_num_threads()
        self.library.coprune_expand(self.address, self.bytes, pointer, first, last, threads)


def multiply_at(address: int, x: Tensor, rows: int, batch: int, dense: bool = False) -> Tensor:
    """Multiply … × I to … × O in the kernel.

    Args:
        address: of a MatrixStruct, whose matrix has x's dtype.
        x: contiguous, float32 or bfloat16.
        rows: O.
        batch: total number of inputs.
        dense: whether the values are the whole matrix.
    """
    y, library = x.new_empty((*x.shape[:-1], rows)), load_kernels()
    assert library is not None
    library.coprune_multiply(
        address, x.dtype.itemsize, dense, x.data_ptr(), y.data_ptr(), batch, torch.get_num_threads()
    )
    return y


def matrix_at(blob: int, starts: int, bias: int | None, places: Places) -> MatrixStruct:
    """Return the kernels' argument for three addresses and a header."""
    return MatrixStruct(blob + places.pattern_at, blob + places.values_at, starts, bias, *places.shape)


_scratches = threading.local()


def _scratch(size: int, dtype: torch.dtype) -> Tensor:
    """Return this thread's buffer: fresh pages for every product would cost more than unpacking into them."""
    kept: Tensor | None = getattr(_scratches, "bytes", None)
    if kept is None or kept.numel() < size * dtype.itemsize:
        kept = _scratches.bytes = on_large_pages(torch.empty(size * dtype.itemsize, dtype=torch.uint8))
    return kept[: size * dtype.itemsize].view(dtype)


def count_rows(blob: Tensor, places: Places) -> Tensor | None:
    """Return the number of values before each row (O + 1 int64), counted by the kernels; None without kernels."""
    library = load_kernels()
    if library is None or sys.byteorder != "little":
        return None
    starts = torch.empty(places.shape[0] + 1, dtype=torch.int64)
    library.coprune_count(blob.data_ptr() + places.pattern_at, *places.shape, starts.data_ptr())
    return starts


def serves(weight: torch.dtype, bias: torch.dtype | None) -> bool:
    """Return whether the kernels support these dtypes on a machine of this byte order."""
    return sys.byteorder == "little" and weight in KERNEL_DTYPES and bias in (None, weight)


def prepare_natively(blob: Tensor, starts: Tensor, places: Places, bias: Tensor | None) -> NativeMatrix | None:
    """Prepare a matrix for the native kernels, on a copy of the blob; None if they do not support it."""
    library = load_kernels()
    if library is None or not serves(places.dtype, None if bias is None else bias.dtype):
        return None
    bias = None if bias is None else bias.detach().contiguous()
    return NativeMatrix(on_large_pages(blob), starts, places, bias, library)


def leave_packed(blob: Tensor, starts: Tensor, places: Places, bias: Tensor | None) -> None:
    """Prepare nothing: without a kernel the matrix is unpacked for every product."""
