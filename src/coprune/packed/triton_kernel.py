"""Decoding from bitmask-packed weights on a GPU, with Triton.

No GPU has run it yet, only Triton's interpreter, so it proves itself (`proven`) before it is used.

One program makes BLOCK_ROWS outputs. For a tile of rows and 32 · WORDS columns it reads the mask as 32-bit words, and
finds each kept value by counting ones: those of earlier words of the row by a running sum, those below the own bit by
masking the word. Values of neighbouring columns are neighbours in memory, so the gathers are nearly contiguous.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from coprune.base.devices import launching_at
from coprune.packed.header import Header

BLOCK_ROWS = 16
WORDS = 2


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _count_ones(word):  # type: ignore[no-untyped-def]
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) & 0xFFFFFFFF) >> 24


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _multiply(mask, values, starts, x, y, rows, columns, BLOCK_ROWS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    sequence = tl.program_id(1)
    row_exists = row < rows
    start = tl.load(starts + row, mask=row_exists, other=0)  # values before the row
    words_per_row = columns // 32
    word_index = tl.arange(0, WORDS)
    lane = tl.arange(0, 32)
    below = (tl.full([32], 1, tl.int64) << lane) - 1  # the bits under each lane
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for first in range(0, words_per_row, WORDS):
        word_exists = row_exists[:, None] & (first + word_index < words_per_row)[None, :]
        address = mask + row[:, None].to(tl.int64) * words_per_row + first + word_index[None, :]
        # 64 bits, so that the top bit is not a sign.
        word = tl.load(address, mask=word_exists, other=0).to(tl.int64) & 0xFFFFFFFF
        ones = _count_ones(word)
        before = start[:, None] + tl.cumsum(ones, axis=1) - ones
        kept = ((word[:, :, None] >> lane[None, None, :]) & 1) != 0
        place = before[:, :, None] + _count_ones(word[:, :, None] & below[None, None, :])
        weight = tl.load(values + place, mask=kept, other=0.0).to(tl.float32)
        column = (first + word_index)[:, None] * 32 + lane[None, :]
        inputs = tl.load(x + sequence * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        total += tl.sum(tl.sum(weight * inputs[None, :, :], axis=2), axis=1)
        start += tl.sum(ones, axis=1)
    tl.store(y + sequence * rows + row, total, mask=row_exists)


def multiply(blob: Tensor, header: Header, starts: Tensor, x: Tensor) -> Tensor:
    """Multiply a few inputs by a packed matrix.

    blob: packed, bitmask layout, I a multiple of 32; starts: O + 1 int64, the values before each row (row_starts);
    x: T × I of the weights' dtype, on the same device. Returns T × O.
    """
    rows, columns = header.shape
    words = blob[header.pattern_at : header.pattern_at + header.pattern_bytes].view(torch.int32)
    values = blob[header.values_at : header.values_at + header.values_bytes].view(header.dtype)
    y = x.new_empty((x.shape[0], rows))
    grid = (triton.cdiv(rows, BLOCK_ROWS), x.shape[0])
    with launching_at(x):
        _multiply[grid](words, values, starts, x.contiguous(), y, rows, columns, BLOCK_ROWS=BLOCK_ROWS, WORDS=WORDS)
    return y
