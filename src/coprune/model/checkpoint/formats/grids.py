"""Grids of values that codes of a few bits can represent, and how codes are packed into bytes and words.

Codes are uint8 here, whatever they are in a file. Nonzero values are never rounded to zero, so that masks are preserved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_BETWEEN = (0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_WORD = 32


class Grid(Protocol):
    """The values of codes, before scaling."""

    def values(self, codes: Tensor, zeros: Tensor | None) -> Tensor:
        """Return float32 values. zeros: the codes of zero, in formats that have zero points."""
        ...

    def nearest(self, values: Tensor, zeros: Tensor | None) -> Tensor:
        """Return the codes of the nearest values, for nonzero input."""
        ...

    def zero(self, zeros: Tensor | None) -> Tensor:
        """Return the code of zero, as a tensor that broadcasts."""
        ...

    def coded(self, points: Tensor) -> Tensor:
        """Return the codes of zero for unpacked zero points."""
        ...


@dataclass(frozen=True)
class Floats8:
    """Floating-point numbers of 8 bits (E4M3 or E5M2)."""

    dtype: torch.dtype = torch.float8_e4m3fn

    def values(self, codes: Tensor, zeros: Tensor | None) -> Tensor:
        found = codes.view(self.dtype).float()
        return found if zeros is None else found - zeros.contiguous().view(self.dtype).float()

    def nearest(self, values: Tensor, zeros: Tensor | None) -> Tensor:
        numbers = torch.finfo(self.dtype)
        if zeros is not None:
            points = zeros.contiguous().view(self.dtype).float()
            codes = (values + points).clamp(-numbers.max, numbers.max).to(self.dtype)
            return torch.where(codes.float() == points, self._beside(zeros, values), codes.view(torch.uint8))
        least = numbers.smallest_normal * numbers.eps
        within = torch.copysign(values.abs().clamp(least, numbers.max), values)
        return within.to(self.dtype).view(torch.uint8)

    def _beside(self, zeros: Tensor, signs: Tensor) -> Tensor:
        """Return the codes next to zero in the direction of the signs; at the largest number, step back."""
        most = int(torch.tensor(torch.finfo(self.dtype).max).to(self.dtype).view(torch.uint8))
        ranks = torch.where(zeros < 0x80, zeros.int(), 0x80 - zeros.int())
        beside = ranks + torch.sign(signs).int()
        beside = torch.where(beside.abs() > most, ranks - torch.sign(signs).int(), beside)
        return torch.where(beside < 0, 0x80 - beside, beside).to(torch.uint8)

    def zero(self, zeros: Tensor | None) -> Tensor:
        return torch.zeros((), dtype=torch.uint8) if zeros is None else zeros

    def coded(self, points: Tensor) -> Tensor:
        return points.contiguous().view(torch.uint8)


@dataclass(frozen=True)
class Floats4:
    """Floating-point numbers of 4 bits (E2M1), as in the OCP microscaling formats."""

    def values(self, codes: Tensor, zeros: Tensor | None) -> Tensor:
        table = torch.tensor([*_FP4, *(-value for value in _FP4)])
        return table[codes.int()]

    def nearest(self, values: Tensor, zeros: Tensor | None) -> Tensor:
        sizes = torch.bucketize(values.abs().contiguous(), torch.tensor(_FP4_BETWEEN)) + 1
        return (sizes + 8 * (values < 0)).to(torch.uint8)

    def zero(self, zeros: Tensor | None) -> Tensor:
        return torch.zeros((), dtype=torch.uint8)

    def coded(self, points: Tensor) -> Tensor:
        raise NotImplementedError("4-bit floating-point formats have no zero points")


@dataclass(frozen=True)
class Integers:
    """Integers; without zero points, the middle code is zero."""

    bits: int

    def values(self, codes: Tensor, zeros: Tensor | None) -> Tensor:
        return codes.float() - self.zero(zeros).float()

    def nearest(self, values: Tensor, zeros: Tensor | None) -> Tensor:
        zero, most = self.zero(zeros).float(), 2.0**self.bits - 1
        rounded = values.round()
        rounded = torch.where(rounded == 0, torch.sign(values), rounded)
        codes = (rounded + zero).clamp(0, most)
        # Where zero is the smallest or largest code, clamping may give it: take its neighbour.
        codes = torch.where(codes == zero, torch.where(zero < most, zero + 1, zero - 1), codes)
        return codes.to(torch.uint8)

    def zero(self, zeros: Tensor | None) -> Tensor:
        return torch.tensor(1 << (self.bits - 1), dtype=torch.uint8) if zeros is None else zeros.to(torch.uint8)

    def coded(self, points: Tensor) -> Tensor:
        return (points.int() + (1 << (self.bits - 1))).to(torch.uint8)


class Packing(Protocol):
    """Layout of a row's codes in a tensor."""

    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        """Return R × columns codes of R stored rows."""
        ...

    def pack(self, codes: Tensor) -> Tensor:
        """Pack R × C codes into R stored rows."""
        ...

    def columns(self, stored: int) -> int:
        """Return the number of columns for a row's number of stored entries."""
        ...


@dataclass(frozen=True)
class Bytes:
    """One code per entry. dtype: of the entries."""

    dtype: torch.dtype

    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        codes = stored.view(torch.uint8)
        return codes ^ 0x80 if self.dtype == torch.int8 else codes

    def pack(self, codes: Tensor) -> Tensor:
        return (codes ^ 0x80 if self.dtype == torch.int8 else codes).contiguous().view(self.dtype)

    def columns(self, stored: int) -> int:
        return stored


@dataclass(frozen=True)
class Nibbles:
    """Two codes per byte, the first in its low half. groups: bytes of a group, where groups are a dimension."""

    groups: int | None = None

    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        flat = stored.reshape(stored.shape[0], -1)
        return torch.stack((flat & 0xF, flat >> 4), dim=-1).reshape(len(flat), -1)

    def pack(self, codes: Tensor) -> Tensor:
        pairs = codes.reshape(len(codes), -1, 2)
        flat = pairs[..., 0] | (pairs[..., 1] << 4)
        return flat if self.groups is None else flat.reshape(len(codes), -1, self.groups)

    def columns(self, stored: int) -> int:
        return 2 * stored * (self.groups or 1)


@dataclass(frozen=True)
class Words:
    """Codes packed into 32-bit words, the first in the lowest bits."""

    bits: int

    @property
    def each(self) -> int:
        """Number of codes in a word."""
        return _WORD // self.bits

    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        shifts = torch.arange(0, _WORD, self.bits, dtype=torch.int32)
        codes = (stored[..., None] >> shifts) & ((1 << self.bits) - 1)
        return codes.reshape(len(stored), -1)[:, :columns].to(torch.uint8)

    def pack(self, codes: Tensor) -> Tensor:
        full = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % self.each))
        full = full.reshape(len(codes), -1, self.each)
        words = (full << torch.arange(0, _WORD, self.bits)).sum(dim=-1)
        return torch.where(words >= 1 << 31, words - (1 << 32), words).int()

    def columns(self, stored: int) -> int:
        return stored * self.each
