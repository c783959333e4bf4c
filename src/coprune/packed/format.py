"""One pruned tensor as bytes: a header, where the kept values are, and the kept values.

A packed tensor is a one-dimensional uint8 tensor that describes itself. "Zero" means that every bit is zero, so that
negative zeros and the payload of every NaN come back exactly. Two layouts say where the kept values are:

- bitmask: one bit per element, any pattern;
- N:M: the positions of N values within every M consecutive elements of the last dimension, log2(M) bits each.

All sections start at multiples of 64 bytes, and 64 zero bytes follow the values, so that a kernel may load whole
vectors at the end. docs/packed-format.md gives every byte.
"""

from __future__ import annotations

import math
import struct
import sys
import zlib
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coprune.base.errors import BadInput, unknown_name
from coprune.packed.header import (
    ALIGNMENT,
    CHECKSUM_AT,
    CHECKSUM_END,
    DTYPE_CODES,
    GROUP_SIZES,
    HEADER,
    LAYOUT_CODES,
    MAGIC,
    MAX_DIMENSIONS,
    VERSION,
    Header,
    read_header,
)

Format = Literal["auto", "bitmask", "nm"]
FORMATS = ("auto", "bitmask", "nm")
BITS_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Bytes = NDArray[np.uint8]


def pack_tensor(tensor: Tensor, format: Format = "auto", drop_negative_zeros: bool = False) -> Tensor | None:
    """Pack a tensor, or return None where no allowed layout is smaller than the dense bytes.

    tensor: any floating dtype of DTYPE_CODES, 2 to 8 dimensions; others return None. format: a layout, or `auto`
    for the smaller one (bitmask where equal). drop_negative_zeros: weights that were pruned by multiplication with
    a mask are full of −0.0, which would be stored as values; True treats them as zeros, and they come back as +0.0.
    Returns a one-dimensional uint8 CPU tensor.
    """
    if format not in FORMATS:
        raise unknown_name("packed format", format, FORMATS, field="format")
    if tensor.dtype not in DTYPE_CODES or not 2 <= tensor.ndim <= MAX_DIMENSIONS or tensor.numel() == 0:
        return None
    tensor = tensor.detach().cpu().contiguous()
    bits = tensor.view(BITS_OF_SIZE[tensor.dtype.itemsize])
    keep = bits != 0
    if drop_negative_zeros:
        bits, keep = bits.masked_fill(negative_zeros(tensor), 0), keep & ~negative_zeros(tensor)
    shape = tuple(tensor.shape)
    candidates: list[Header] = []
    if format != "nm":
        candidates.append(Header("bitmask", tensor.dtype, shape, int(keep.sum())))
    if format != "bitmask":
        candidates.extend(_nm_headers(tensor.dtype, shape, keep))
    smallest = min(candidates, key=lambda header: header.total_bytes, default=None)
    if smallest is None or smallest.total_bytes >= tensor.numel() * tensor.dtype.itemsize:
        return None
    if smallest.layout == "bitmask":
        pattern = np.packbits(keep.reshape(-1).numpy(), bitorder="little")
        values = bits[keep]
    else:
        pattern, values = _encode_nm(bits, keep, smallest)
    return assemble_packed(smallest, pattern, values)


def negative_zeros(tensor: Tensor) -> Tensor:
    """Return where a floating-point tensor is −0.0, as bool."""
    wide = tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor  # 8-bit floats cannot be compared
    return (wide == 0) & torch.signbit(wide)


def check_packed(blob: Tensor) -> Header:
    """Check a packed tensor's header, checksum and pattern; BadInput on any damage. Returns the header."""
    header = read_header(blob)
    data = blob.numpy()
    if _checksum(data) != header.checksum:
        raise BadInput("damaged packed tensor: the checksum does not match", fix="copy or pack the model again")
    pattern = data[header.pattern_at : header.pattern_at + header.pattern_bytes]
    if header.layout == "bitmask":
        # The checksum covers this, but a wrong count would send a kernel past the end of the values.
        if count_bits(pattern) != header.kept or (header.numel % 8 and pattern[-1] >> (header.numel % 8)):
            raise BadInput("damaged packed tensor: the bitmask and the number of values disagree")
    else:
        positions = _positions(header, pattern)
        if bool((np.diff(positions.astype(np.int16), axis=1) <= 0).any()):
            raise BadInput("damaged packed tensor: the N:M positions of a group are not ascending")
    return header


def unpack_tensor(blob: Tensor) -> Tensor:
    """Restore the dense tensor, bit for bit. blob: uint8 on the CPU. Raises BadInput on any damage."""
    return expand_checked(blob, check_packed(blob))


def expand_checked(blob: Tensor, header: Header) -> Tensor:
    """Unpack a tensor that check_packed has accepted."""
    keep = torch.from_numpy(keep_bits(blob, header)).view(torch.bool)
    end = header.values_at + header.values_bytes
    bits_dtype = BITS_OF_SIZE[header.dtype.itemsize]
    # Sliced from aligned bytes: a view as a wider dtype needs an offset that its size divides.
    values = in_byte_order(aligned_bytes(blob)[header.values_at : end], header.dtype.itemsize).view(bits_dtype)
    dense = torch.zeros(header.numel, dtype=bits_dtype)
    dense[keep] = values
    return dense.view(header.dtype).reshape(header.shape)


def keep_bits(blob: Tensor, header: Header) -> Bytes:
    """Return one byte per element in row-major order, 1 where a value is stored (for N:M that value may be a zero)."""
    pattern = blob.numpy()[header.pattern_at : header.pattern_at + header.pattern_bytes]
    if header.layout == "bitmask":
        return np.unpackbits(pattern, count=header.numel, bitorder="little")
    keep = np.zeros((header.numel // header.m, header.m), dtype=np.uint8)
    np.put_along_axis(keep, _positions(header, pattern).astype(np.int64), 1, axis=1)
    return keep.reshape(-1)


def aligned_bytes(blob: Tensor) -> Tensor:
    """Return the bytes at an address that 64 divides, copied only if necessary (mapped files are unaligned)."""
    if blob.storage_offset() % 8 == 0 and blob.data_ptr() % ALIGNMENT == 0:
        return blob
    return blob.clone()


def in_byte_order(stored: Tensor, size: int) -> Tensor:
    """Convert values of `size` bytes each between this machine's byte order and the format's (little-endian)."""
    if sys.byteorder == "little" or size == 1:
        return stored
    return stored.reshape(-1, size).flip(1).reshape(-1)


def count_bits(pattern: Bytes) -> int:
    """Return the number of ones in a uint8 array."""
    whole = pattern.size // 8 * 8
    words = pattern[:whole].tobytes() if pattern.ctypes.data % 8 else pattern[:whole]
    ones = np.bitwise_count(np.frombuffer(words, dtype=np.uint64)).sum(dtype=np.int64)
    return int(ones) + int(np.bitwise_count(pattern[whole:]).sum(dtype=np.int64))


def _checksum(data: Bytes) -> int:
    return zlib.crc32(data[CHECKSUM_END:].data, zlib.crc32(data[:CHECKSUM_AT].data))


def _nm_headers(dtype: torch.dtype, shape: tuple[int, ...], keep: Tensor) -> list[Header]:
    headers = []
    for m in GROUP_SIZES:
        if shape[-1] % m == 0:
            n = max(int(keep.reshape(-1, m).sum(dim=1, dtype=torch.uint8).max()), 1)
            if n < m:
                headers.append(Header("nm", dtype, shape, math.prod(shape) // m * n, n, m))
    return headers


def _encode_nm(bits: Tensor, keep: Tensor, header: Header) -> tuple[Bytes, Tensor]:
    groups = keep.reshape(-1, header.m).to(torch.uint8)
    # Kept positions first, then (where a group has fewer than N) the lowest of the others, ascending in the end.
    order = groups.argsort(dim=1, descending=True, stable=True)[:, : header.n].sort(dim=1).values
    values = bits.reshape(-1, header.m).gather(1, order).reshape(-1)
    positions = order.to(torch.uint8).reshape(-1, 1).numpy()
    spread = (positions >> np.arange(header.index_bits, dtype=np.uint8)) & 1
    return np.packbits(spread.reshape(-1), bitorder="little"), values


def _positions(header: Header, pattern: Bytes) -> Bytes:
    width = header.index_bits
    spread = np.unpackbits(pattern, count=header.kept * width, bitorder="little").reshape(-1, width)
    positions: Bytes = (spread << np.arange(width, dtype=np.uint8)).sum(axis=1, dtype=np.uint8).reshape(-1, header.n)
    return positions


def assemble_packed(header: Header, pattern: Bytes, values: Tensor) -> Tensor:
    """Build a packed tensor from the bytes of the pattern, and the values as any dtype of their size."""
    blob = torch.zeros(header.total_bytes, dtype=torch.uint8)
    data = blob.numpy()
    codes = (LAYOUT_CODES[header.layout], DTYPE_CODES[header.dtype], header.n, header.m, len(header.shape))
    start = HEADER.pack(MAGIC, VERSION, *codes, 0, 0, header.kept) + struct.pack(
        f"<{len(header.shape)}Q", *header.shape
    )
    data[: len(start)] = np.frombuffer(start, dtype=np.uint8)
    data[header.pattern_at : header.pattern_at + pattern.size] = pattern
    stored = in_byte_order(values.contiguous().view(torch.uint8), header.dtype.itemsize)
    blob[header.values_at : header.values_at + header.values_bytes] = stored
    struct.pack_into("<I", data.data, CHECKSUM_AT, _checksum(data))
    return blob
