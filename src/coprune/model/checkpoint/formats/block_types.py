"""Types of a GGUF file whose values are multiples of scales: their grids, the choice of scales, and their bytes.

A row consists of blocks, each with a float16 scale (`number`); in some types a block consists of groups, each with a factor of
a few bits. A value is

    number · factor · point[code]  −  least · minimum

where types without factors have 1, and types without minima have 0; two types add a float16 to every block instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_HALF = 65504.0
_SMALLEST = 1e-30
"""Lower bound of divisors."""
_STEPS = 12
"""Number of scales tried per group and sign."""
_ROUNDS = 3
"""Number of alternations between fitting codes and scales."""


class Plane(NamedTuple):
    """Some bits of every code, several codes per byte."""

    first: int
    """The lowest bit."""
    bits: int
    stretch: int
    """Distance between codes that share a byte, which is filled from its lowest bits."""

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes (N × C uint8) into N × C · bits / 8 bytes."""
        each = 8 // self.bits
        parts = ((codes >> self.first) & ((1 << self.bits) - 1)).reshape(len(codes), -1, each, self.stretch)
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8)[:, None]
        return (parts << shifts).sum(dim=2, dtype=torch.uint8).reshape(len(codes), -1)


class Scales(NamedTuple):
    """The numbers that map codes to values, for O rows of one block each or for consecutive blocks."""

    number: Tensor
    """O × 1 float32, representable in float16."""
    factors: Tensor | None
    """O × groups float32, whole."""
    least: Tensor | None
    """O × 1 float32, representable in float16; in types without minima, the offset itself."""
    minima: Tensor | None
    """O × groups float32, whole."""

    @property
    def steps(self) -> Tensor:
        """Return the multipliers of points, O × groups float32."""
        return self.number if self.factors is None else self.number * self.factors

    @property
    def added(self) -> Tensor | None:
        """Return the offsets added to the products, O × groups float32."""
        if self.least is None or self.minima is None:
            return self.least
        return -(self.least * self.minima)


Piece = Callable[[Scales, Tensor], Tensor]
"""Packs some bytes of N blocks (N × bytes uint8) from their scales and codes (N × values uint8)."""


@dataclass(frozen=True)
class BlockType:
    """A GGUF quantisation type."""

    points: tuple[int, ...]
    """Values of the codes, ascending."""
    pieces: tuple[Piece, ...]
    """The parts of a block in the file."""
    size: int = 32
    """Number of values in a block."""
    group: int = 32
    """Number of values in a group, which has a factor of its own."""
    factors: tuple[int, int] | None = None
    """Least and greatest factor of a group; None where groups have none."""
    minima: int | None = None
    """Greatest minimum of a group; 0 where a float16 is added to a block; None where nothing is added."""

    @property
    def zero(self) -> bool:
        """Whether zero is representable under any scale."""
        return self.minima is None and 0 in self.points

    @property
    def _even(self) -> bool:
        return self.points[-1] - self.points[0] == len(self.points) - 1

    def codes(self, values: Tensor) -> Tensor:
        """Return the codes of the points nearest to values, float32 in the values' shape."""
        if self._even:
            return values.sub(self.points[0]).round_().clamp_(0, len(self.points) - 1)
        points = torch.tensor(self.points, dtype=torch.float32)
        return torch.bucketize(values.contiguous(), (points[1:] + points[:-1]) / 2, out_int32=True).float()

    def at(self, codes: Tensor) -> Tensor:
        """Return the points of codes (of any number type), float32."""
        if self._even:
            return codes.float() + self.points[0]
        return torch.tensor(self.points, dtype=torch.float32)[codes.int()]

    def _nearest(self, values: Tensor) -> Tensor:
        if self._even:
            return values.round_().clamp_(self.points[0], self.points[-1])
        return self.at(self.codes(values))

    def fit(self, values: Tensor, weights: Tensor) -> Scales:
        """Choose the scales of a block of columns with a small weighted squared error.

        Args:
            values: O × size float32.
            weights: size float32, positive: the weight of each column's error.
        """
        grouped, weights = values.unflatten(1, (-1, self.group)), weights.reshape(-1, self.group)
        if self.minima is None:
            steps, added = self._steps(grouped, weights), None
        else:
            steps, added = self._lines(grouped, weights)
        if self.factors is None:
            return Scales(_half(steps), None, None if added is None else _half(added), None)
        return self._refined(grouped, weights, self._coarse(steps, added))

    def _steps(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the step of every group (O × groups float32) without an offset: its largest value lies near an end."""
        largest = values.gather(2, values.abs().argmax(dim=2, keepdim=True))
        weighted = values * weights
        best, steps = torch.full(values.shape[:2], -1.0), torch.zeros(values.shape[:2])
        for end, beyond in product((self.points[0], self.points[-1]), self._beyond()):
            points = self._nearest(values * ((end + beyond * (1 if end > 0 else -1)) / _divisor(largest)))
            both, own = (weighted * points).sum(dim=2), _over(points.square(), weights)
            gain = both.square() / own.clamp_min(_SMALLEST)
            better = gain > best
            best = torch.where(better, gain, best)
            steps = torch.where(better, both / own.clamp_min(_SMALLEST), steps)
        return steps

    def _beyond(self) -> list[float]:
        """Return the tried positions of a group's largest value, in points beyond the last one (negative: before it)."""
        top = max(-self.points[0], self.points[-1])
        points = (self.points[-1] - self.points[0]) / (len(self.points) - 1)
        found: list[float] = torch.linspace(-0.9, 1 + min(top / points / 4, 2), _STEPS).mul(points).tolist()
        return found if len(self.points) < _MANY else found[1::3]

    def _lines(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step and the offset of every group, O × groups float32 each."""
        top, negative = self.points[-1], bool(self.minima)
        low, high = values.amin(dim=2, keepdim=True), values.amax(dim=2, keepdim=True)
        low = low.clamp_max(0) if negative else low
        line = partial(_line, values, values * weights, weights, negative)
        best, steps, added = torch.full(values.shape[:2], torch.inf), torch.zeros(0), torch.zeros(0)
        for beyond in self._beyond():
            found = line(((values - low) * ((top + beyond) / _divisor(high - low))).round_().clamp_(0, top))
            best, steps, added = _better(best, (steps, added), found)
        for _ in range(_ROUNDS):
            codes = ((values - added[..., None]) / _divisor(steps)[..., None]).round_().clamp_(0, top)
            best, steps, added = _better(best, (steps, added), line(codes))
        return steps, added

    def _coarse(self, steps: Tensor, added: Tensor | None) -> Scales:
        """Round the scales of the groups to factors and minima."""
        assert self.factors is not None
        low, high = self.factors
        largest = steps.gather(1, steps.abs().argmax(dim=1, keepdim=True))
        number = _half(largest / (low if low < 0 else high))
        factors = (steps / _divisor(number)).round().clamp(low, high)
        if added is None or self.minima is None:
            return Scales(number, factors, None, None)
        least = _half(-added.amin(dim=1, keepdim=True) / self.minima)
        return Scales(number, factors, least, (-added / _divisor(least)).round().clamp(0, self.minima))

    def _refined(self, values: Tensor, weights: Tensor, scales: Scales) -> Scales:
        """Try neighbouring factors and minima, keeping those that lower the error of values rounded with the stored scales."""
        assert self.factors is not None
        assert scales.factors is not None
        best, found = torch.full(values.shape[:2], torch.inf), scales
        moves = (0, -1, 1)
        for move, other in product(moves, (0,) if scales.minima is None else moves):
            factors = (scales.factors + move).clamp(*self.factors)
            minima = None if scales.minima is None else (scales.minima + other).clamp(0, float(self.minima or 0))
            tried = scales._replace(factors=factors, minima=minima)
            errors = self._rounded(values, tried).sub_(values).square_()
            error = _over(errors, weights)
            better = error < best
            best = torch.where(better, error, best)
            assert found.factors is not None
            found = found._replace(factors=torch.where(better, factors, found.factors))
            if minima is not None and found.minima is not None:
                found = found._replace(minima=torch.where(better, minima, found.minima))
        return found

    def _rounded(self, values: Tensor, scales: Scales) -> Tensor:
        steps, added = scales.steps[..., None], scales.added
        if added is None:
            return self._nearest(values / _divisor(steps)).mul_(steps)
        return self._nearest((values - added[..., None]) / _divisor(steps)).mul_(steps).add_(added[..., None])

    def pack(self, scales: Scales, codes: Tensor) -> Tensor:
        """Return the bytes of N blocks: scales of N rows, codes N × size uint8."""
        return torch.cat([piece(scales, codes) for piece in self.pieces], dim=1)


_MANY = 64
"""Number of points from which few scales are tried, since each is good."""


def _half(values: Tensor) -> Tensor:
    return values.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float()


def _divisor(values: Tensor) -> Tensor:
    """Return values with zeros replaced by infinity, so that dividing by them gives zero."""
    return torch.where(values == 0, torch.inf, values)


def _over(values: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums over the values of groups. values: O × groups × C; weights: groups × C."""
    return (values * weights).sum(dim=2)


def _line(
    values: Tensor, weighted: Tensor, weights: Tensor, negative: bool, codes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the line from codes to values; return its error up to a constant, its step and its offset.

    Args:
        values: O × groups × C float32.
        weighted: the same times their weights.
        weights: groups × C.
        negative: whether the offset must not be positive.
        codes: O × groups × C float32.
    """
    every, ones = weights.sum(dim=1), weighted.sum(dim=2)
    own, squares, both = _over(codes, weights), _over(codes.square(), weights), (weighted * codes).sum(dim=2)
    spread = every * squares - own.square()
    flat = spread <= 1e-6 * every * squares
    steps = torch.where(flat, 0.0, (every * both - ones * own) / torch.where(flat, 1.0, spread))
    added = (ones - steps * own) / every
    if negative:
        alone = both / squares.clamp_min(_SMALLEST)
        steps, added = torch.where(added > 0, alone, steps), added.clamp_max(0)
    steps = steps.clamp_min(0)
    error = steps.square() * squares + added.square() * every
    error += 2 * (steps * added * own - steps * both - added * ones)
    return error, steps, added


def _better(best: Tensor, old: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    error, *new = found
    if not len(old[0]):
        return error, new[0], new[1]
    better = error < best
    return (
        torch.where(better, error, best),
        torch.where(better, new[0], old[0]),
        torch.where(better, new[1], old[1]),
    )


def _bytes(values: Tensor) -> Tensor:
    return values.half().view(torch.uint8)


def _number(scales: Scales, codes: Tensor) -> Tensor:
    return _bytes(scales.number)


def _least(scales: Scales, codes: Tensor) -> Tensor:
    assert scales.least is not None
    return _bytes(scales.least)


def _signed(scales: Scales, codes: Tensor) -> Tensor:
    """Pack codes as signed 8-bit integers; the code 0 is −128."""
    return codes ^ 0x80


def _of_codes(*plane: int) -> Piece:
    return lambda scales, codes: Plane(*plane).pack(codes)


def _of_factors(above: int, *planes: tuple[int, int, int]) -> Piece:
    """Return the packing of the factors' bits. above: added to factors before they are stored."""

    def pack(scales: Scales, codes: Tensor) -> Tensor:
        assert scales.factors is not None
        stored = (scales.factors + above).to(torch.int16).to(torch.uint8)
        return torch.cat([Plane(*plane).pack(stored) for plane in planes], dim=1)

    return pack


def _four_and_four(scales: Scales, codes: Tensor) -> Tensor:
    """Pack a factor and a minimum of four bits into every byte."""
    assert scales.factors is not None
    assert scales.minima is not None
    return scales.factors.to(torch.uint8) | (scales.minima.to(torch.uint8) << 4)


def _six_and_six(scales: Scales, codes: Tensor) -> Tensor:
    """Pack eight factors and minima of six bits: the first four of each in four bytes, whose upper bits the others share."""
    assert scales.factors is not None
    assert scales.minima is not None
    (first, last), (low, other) = (whole.to(torch.uint8).split(4, dim=1) for whole in (scales.factors, scales.minima))
    upper = [start | ((end >> 4) << 6) for start, end in ((first, last), (low, other))]
    return torch.cat([*upper, (last & 0xF) | ((other & 0xF) << 4)], dim=1)


def _points(low: int, bits: int) -> tuple[int, ...]:
    return tuple(range(low, low + (1 << bits)))


_UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FIFTH, _NIBBLES = _of_codes(4, 1, 1), _of_codes(0, 4, 16)
_WIDE = _of_codes(0, 4, 32)
BLOCK_TYPES = {
    "q4_0": BlockType(_points(-8, 4), (_number, _NIBBLES)),
    "q5_0": BlockType(_points(-16, 5), (_number, _FIFTH, _NIBBLES)),
    "q8_0": BlockType(_points(-128, 8), (_number, _signed)),
    "iq4_nl": BlockType(_UNEVEN, (_number, _NIBBLES)),
    "q4_1": BlockType(_points(0, 4), (_number, _least, _NIBBLES), minima=0),
    "q5_1": BlockType(_points(0, 5), (_number, _least, _FIFTH, _NIBBLES), minima=0),
    "q2_k": BlockType(
        _points(0, 2), (_four_and_four, _of_codes(0, 2, 32), _number, _least), 256, 16, factors=(0, 15), minima=15
    ),
    "q3_k": BlockType(
        _points(-4, 3),
        (_of_codes(2, 1, 32), _of_codes(0, 2, 32), _of_factors(32, (0, 4, 8), (4, 2, 4)), _number),
        256,
        16,
        factors=(-32, 31),
    ),
    "q4_k": BlockType(_points(0, 4), (_number, _least, _six_and_six, _WIDE), 256, factors=(0, 63), minima=63),
    "q5_k": BlockType(
        _points(0, 5), (_number, _least, _six_and_six, _of_codes(4, 1, 32), _WIDE), 256, factors=(0, 63), minima=63
    ),
    "q6_k": BlockType(
        _points(-32, 6),
        (_of_codes(0, 4, 64), _of_codes(4, 2, 32), _of_factors(256, (0, 8, 1)), _number),
        256,
        16,
        factors=(-128, 127),
    ),
    "iq4_xs": BlockType(_UNEVEN, (_number, _of_factors(32, (4, 2, 1), (0, 4, 1)), _NIBBLES), 256, factors=(-32, 31)),
}
"""Types by their names in ggml."""
