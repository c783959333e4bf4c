"""Grids that values of weights are rounded to: what `--quantize` names.

Symmetric: a value is a whole number of steps, from −2^(bits − 1) to 2^(bits − 1) − 1, so that a zero lies on every grid.
A step belongs to some inputs of one output row that follow each other, its group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from coprune.base.errors import BadInput
from coprune.base.options import one_of, require_positive
from coprune.base.words import Set, Words
from coprune.recipe.choice import Choice

SCALE_BITS = 16
"""What a step takes: it is a bfloat16 number."""


@dataclass(frozen=True)
class Grid:
    """How many bits a value has, and how many inputs share a step."""

    bits: ClassVar[int]

    group: int | None = None
    """Inputs that share a step; null for whole rows."""

    def __post_init__(self) -> None:
        if self.group is not None:
            require_positive(group=self.group)

    def __str__(self) -> str:
        """As `--quantize` takes it."""
        if self.group is None and self == type(self)():
            return f"int{self.bits}"
        return f"int{self.bits}:group={'null' if self.group is None else self.group}"

    @property
    def half(self) -> int:
        """Codes are from −half to half − 1."""
        return 1 << (self.bits - 1)

    def step(self, width: int) -> int:
        """How many of so many inputs share a step."""
        return self.group or width

    def steps(self, width: int) -> int:
        """How many steps a row of so many inputs has."""
        return width // self.step(width)

    def fits(self, width: int) -> bool:
        """Whether groups divide so many inputs."""
        return width % self.step(width) == 0

    def check_width(self, width: int) -> None:
        """Raise BadInput where groups do not divide so many inputs."""
        if not self.fits(width):
            cause = f"groups of {self.group} inputs that share a step do not divide a width of {width}"
            raise BadInput(cause, field="quantize", value=self.group)

    def check_groups(self, pattern_group: int | None) -> None:
        """Raise BadInput where groups cut through those of a pattern."""
        if self.group is None or pattern_group is None or self.group % pattern_group == 0:
            return
        whole = self.group + -self.group % pattern_group
        cause = f"groups of {self.group} inputs that share a step cut through the pattern's groups of {pattern_group}"
        fix: Words = ("take ", Set("quantize", str(replace(self, group=whole))))
        raise BadInput(cause, field="quantize", value=self.group, fix=fix)


@dataclass(frozen=True)
class Int8(Grid):
    """256 values, by default with a step for every output row, as runtimes for 8 bits have it."""

    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Int4(Grid):
    """16 values with a step for every 64 inputs: a row's largest weight alone would leave the others two or three values."""

    bits: ClassVar[int] = 4

    group: int | None = 64


GRIDS: dict[str, Grid] = {"int8": Int8(), "int4": Int4()}


def grid_named(asked: Choice) -> Grid:
    """Look a grid up and set its options. Raises BadInput for an unknown name or option, or a value out of range."""
    return one_of(GRIDS, "grid", asked.name, asked.options, "quantize")
