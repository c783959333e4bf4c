"""A packed matrix in memory, and products computed from it on the CPU.

The kernels read the bytes of the file as they are: kept values and bitmask, plus one number per row (how many values
come before it). Up to `IN_KERNEL` inputs are multiplied straight from the packed weights; more of them (a long
prompt) are bound by arithmetic, so rows are unpacked tile by tile and given to PyTorch's dense product.
"""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from coprune.base.errors import BadInput
from coprune.base.native.build import MatrixStruct, load_kernels
from coprune.packed.format import aligned_bytes, assemble_packed, keep_bits, pack_tensor
from coprune.packed.header import Header, read_header
from coprune.packed.pages import on_large_pages

IN_KERNEL = {torch.float32: 64, torch.bfloat16: 12}  # inputs; measured where the tiles begin to win
TILE_BYTES = 16 << 20
KERNEL_DTYPES = {torch.float32: 4, torch.bfloat16: 2}


def pack_matrix(weight: Tensor) -> Tensor | None:
    """Pack an O × I weight for multiplication (bitmask layout), or None where that would not be smaller.

    Negative zeros become zeros, which no product tells apart.
    """
    return pack_tensor(weight, "bitmask", drop_negative_zeros=True)


def for_kernels(blob: Tensor) -> Tensor:
    """The same matrix in the bitmask layout that the kernels read, at aligned bytes.

    blob: a packed tensor that check_packed accepts, with two dimensions (else BadInput).
    """
    header = read_header(blob)
    if len(header.shape) != 2:
        raise BadInput(f"a packed tensor of the shape {header.shape} is not a matrix.")
    if header.layout == "bitmask":
        return aligned_bytes(blob)
    # Padding zeros of the N:M layout stay values: dropping them would need another pass for a few bytes.
    pattern = np.packbits(keep_bits(blob, header), bitorder="little")
    bitmask = Header("bitmask", header.dtype, header.shape, header.kept)
    values = aligned_bytes(blob)[header.values_at : header.values_at + header.values_bytes]
    return assemble_packed(bitmask, pattern, values)


class NativeMatrix:
    """What a kernel needs to know of one packed matrix: pointers into it, kept alive here."""

    def __init__(self, blob: Tensor, header: Header, bias: Tensor | None, library: ctypes.CDLL) -> None:
        """blob: packed, bitmask layout, on the CPU, checked, and copied; bias: O values of its dtype, contiguous."""
        blob = on_large_pages(blob)
        self.blob, self.bias = blob, bias
        self.rows, self.columns = header.shape
        self.dtype, self.bytes = header.dtype, header.dtype.itemsize
        self.starts = torch.empty(self.rows + 1, dtype=torch.int64)
        start = blob.data_ptr()
        pointers = (start + header.pattern_at, start + header.values_at, self.starts.data_ptr())
        self.struct = MatrixStruct(*pointers, None if bias is None else bias.data_ptr(), self.rows, self.columns)
        self.address = ctypes.addressof(self.struct)
        self.library = library
        self.call = library.coprune_multiply
        counted = library.coprune_count(start + header.pattern_at, self.rows, self.columns, self.starts.data_ptr())
        if counted != header.kept:
            raise BadInput("damaged packed matrix: the bitmask and the number of values disagree.")

    def multiply(self, x: Tensor, batch: int) -> Tensor:
        """… × I to … × O in the kernel. x: contiguous, of the weights' dtype, `batch` rows in all."""
        y = x.new_empty((*x.shape[:-1], self.rows))
        self.call(self.address, self.bytes, 0, x.data_ptr(), y.data_ptr(), batch, torch.get_num_threads())
        return y

    def multiply_by_tiles(self, x: Tensor, batch: int) -> Tensor:
        """The same for many inputs: unpack some rows, multiply them as a dense matrix, go on."""
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


_scratches = threading.local()


def _scratch(size: int, dtype: torch.dtype) -> Tensor:
    """A buffer that this thread keeps: fresh pages for every product would cost more than unpacking into them."""
    kept: Tensor | None = getattr(_scratches, "bytes", None)
    if kept is None or kept.numel() < size * dtype.itemsize:
        kept = _scratches.bytes = on_large_pages(torch.empty(size * dtype.itemsize, dtype=torch.uint8))
    return kept[: size * dtype.itemsize].view(dtype)


def native_matrix(blob: Tensor, header: Header, bias: Tensor | None) -> NativeMatrix | None:
    """Prepare a packed matrix for the kernels; None where they do not serve its device or dtype or are missing."""
    if blob.device.type != "cpu":
        return None
    library = load_kernels() if header.dtype in KERNEL_DTYPES and header.layout == "bitmask" else None
    if library is None or (bias is not None and bias.dtype != header.dtype):
        return None
    return NativeMatrix(blob, header, None if bias is None else bias.detach().contiguous(), library)


def dense_matrix(blob: Tensor, header: Header) -> Tensor:
    """The dense weight of a packed matrix in the bitmask layout, on the blob's device. Only torch operations."""
    pattern = blob[header.pattern_at : header.pattern_at + header.pattern_bytes]
    shifts = torch.arange(8, dtype=torch.uint8, device=blob.device)
    keep = ((pattern[:, None] >> shifts) & 1).reshape(-1)[: header.numel].to(torch.bool)
    values = blob[header.values_at : header.values_at + header.values_bytes].view(header.dtype)
    dense = torch.zeros(header.numel, dtype=header.dtype, device=blob.device)
    return dense.masked_scatter_(keep, values).reshape(header.shape)
