"""The first bytes of a packed tensor: what they say, and where everything after them lies."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coprune.base.errors import BadInput

MAGIC = b"COPRUNE\0"
VERSION = 1
ALIGNMENT = 64
SLACK = 64  # zero bytes after the values
HEADER = struct.Struct("<8sHBBBBBxIIQ")
CHECKSUM_AT, CHECKSUM_END = 16, 20  # the checksum covers every other byte
MAX_DIMENSIONS = 8

Layout = Literal["bitmask", "nm"]
LAYOUT_CODES: dict[Layout, int] = {"bitmask": 1, "nm": 2}
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float64: 1,
    torch.float32: 2,
    torch.float16: 3,
    torch.bfloat16: 4,
    torch.float8_e4m3fn: 5,
    torch.float8_e5m2: 6,
}
GROUP_SIZES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Header:
    """Header of a packed tensor, checked against its length."""

    layout: Layout
    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: int
    """Stored values."""
    n: int = 0
    m: int = 0
    checksum: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def index_bits(self) -> int:
        """Bits of one position in a group of M."""
        return max(self.m - 1, 1).bit_length()

    @property
    def pattern_at(self) -> int:
        return _aligned(HEADER.size + 8 * len(self.shape))

    @property
    def pattern_bytes(self) -> int:
        bits = self.numel if self.layout == "bitmask" else self.kept * self.index_bits
        return -(-bits // 8)

    @property
    def values_at(self) -> int:
        return self.pattern_at + _aligned(self.pattern_bytes)

    @property
    def values_bytes(self) -> int:
        return self.kept * self.dtype.itemsize

    @property
    def total_bytes(self) -> int:
        return self.values_at + _aligned(self.values_bytes + SLACK)


def is_packed(tensor: Tensor) -> bool:
    """Return whether a tensor is packed, by its dtype and first bytes."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() < HEADER.size:
        return False
    return bytes(tensor[: len(MAGIC)].tolist()) == MAGIC


def read_header(blob: Tensor) -> Header:
    """Read and check the header of a packed tensor. Raises BadInput if it contradicts itself or the length."""
    if not is_packed(blob):
        raise BadInput("not a packed tensor: it does not begin with coprune's mark")
    start = bytes(blob[: HEADER.size + 8 * MAX_DIMENSIONS].tolist())
    _, version, layout_code, dtype_code, n, m, ndim, checksum, _, kept = HEADER.unpack_from(start)
    if version != VERSION:
        raise BadInput(
            f"the packed format has version {version}, and this coprune reads version {VERSION}", fix="update coprune"
        )
    layouts = {code: layout for layout, code in LAYOUT_CODES.items()}
    dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
    if layout_code not in layouts or dtype_code not in dtypes or not 2 <= ndim <= MAX_DIMENSIONS:
        raise BadInput("damaged packed tensor: unknown layout, dtype or number of dimensions in its header")
    if len(start) < HEADER.size + 8 * ndim:
        raise BadInput("damaged packed tensor: it ends within its header")
    shape = struct.unpack_from(f"<{ndim}Q", start, HEADER.size)
    header = Header(layouts[layout_code], dtypes[dtype_code], shape, kept, n, m, checksum)
    if header.layout == "nm" and not (m in GROUP_SIZES and 0 < n < m and shape[-1] % m == 0):
        raise BadInput(f"damaged packed tensor: {n}:{m} does not fit the shape {shape}")
    possible = kept <= header.numel if header.layout == "bitmask" else kept * m == header.numel * n
    if header.numel == 0 or not possible or header.total_bytes != blob.numel():
        raise BadInput(
            f"damaged packed tensor: {blob.numel():,} bytes do not hold {kept:,} values of the shape {shape}",
            fix="pack the model again",
        )
    return header


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
