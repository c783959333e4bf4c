"""Packed matrices that store exactly two of every four consecutive inputs, as the 2:4 products of GPUs want it.

Where pruning kept a weight that is zero by itself, one or none of its four is stored. Such zeros are stored in memory, where
that adds next to nothing, so that a single one does not keep a whole matrix from those products.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coprune.packed.format import Bytes, assemble_packed, in_byte_order
from coprune.packed.header import Header

DTYPES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64
"""Divisors of O and I that torch's product requires."""
MOST_ADDED = 0.01
"""Zeros that may be added, as a share of the stored values."""


def fits(header: Header) -> bool:
    """Return whether torch has a 2:4 product for weights of this dtype and shape."""
    rows, columns = header.shape
    return header.dtype in DTYPES and not rows % ROWS and not columns % COLUMNS


def stores_two_of_four(blob: Tensor, header: Header) -> bool:
    """Return whether a packed matrix `fits` and stores exactly two of every four consecutive inputs.

    Args:
        blob: in the bitmask layout, in host memory.
        header: its header, O × I.
    """
    return fits(header) and 2 * header.kept == header.numel and bool(CODES[_pattern(blob, header)].all())


def fill_up(blob: Tensor, header: Header) -> Tensor:
    """Store zeros so that a matrix `stores_two_of_four`; unchanged if that is impossible or adds too much.

    Args:
        blob: in the bitmask layout, in host memory, at aligned bytes.
        header: its header, O × I.
    """
    missing = header.numel // 2 - header.kept
    if not fits(header) or not 0 < missing <= MOST_ADDED * header.kept:
        return blob
    pattern = _pattern(blob, header)
    filled: Bytes = FILLED[pattern]
    if not filled.all():
        return blob
    stored = in_byte_order(blob[header.values_at : header.values_at + header.values_bytes], header.dtype.itemsize)
    values = np.insert(stored.view(torch.int16).numpy(), _added(pattern, filled), 0)
    bitmask = Header("bitmask", header.dtype, header.shape, header.kept + missing)
    return assemble_packed(bitmask, filled, torch.from_numpy(values))


def _added(pattern: Bytes, filled: Bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the number of values of a pattern before each bit that `filled` adds."""
    changed = np.flatnonzero(filled != pattern)
    old, added = pattern[changed], filled[changed] ^ pattern[changed]
    before = np.bitwise_count(pattern).cumsum(dtype=np.int64)[changed] - np.bitwise_count(old)
    places = []
    for bit in range(8):
        below = np.bitwise_count(old & np.uint8((1 << bit) - 1))
        places.append((before + below)[(added >> bit) & 1 == 1])
    return np.concatenate(places)


def _pattern(blob: Tensor, header: Header) -> Bytes:
    pattern: Bytes = blob[header.pattern_at : header.pattern_at + header.pattern_bytes].numpy()
    return pattern


def _code(four: int) -> int:
    """Return CUTLASS's code of a four-bit pattern, both kept positions; 0, an invalid code, unless two are kept."""
    kept = [position for position in range(4) if four >> position & 1]
    return kept[0] | kept[1] << 2 if len(kept) == 2 else 0


def _filled(four: int) -> int:
    """Return a pattern of four bits with the lowest others added until there are two; 0 if there are more."""
    for position in range(4):
        if four.bit_count() < 2:
            four |= 1 << position
    return four if four.bit_count() == 2 else 0


def _of_bytes(of_four: list[int]) -> Bytes:
    """Return the table for eight bits; 0 where one of both halves has 0."""
    pairs = [(of_four[byte & 15], of_four[byte >> 4]) for byte in range(256)]
    return np.array([low | high << 4 if low and high else 0 for low, high in pairs], dtype=np.uint8)


CODES = _of_bytes([_code(four) for four in range(16)])
"""CUTLASS's metadata of eight inputs by their byte of a bitmask; 0 where it does not keep two of four, twice."""
FILLED = _of_bytes([_filled(four) for four in range(16)])
"""A byte of a bitmask with bits added until it keeps two of four, twice; 0 where it keeps more."""
