"""Allocation by a file that gives sparsities by globs of names.

The file is a YAML mapping from shell-like globs to sparsities, or to N:M if the run's pattern is N:M; the first matching
glob counts. Matrices without a matching glob share the rest of the budget.

    "*.v_proj": 0.4
    "model.layers.0.*": 0.55
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.validation import read_yaml
from coprune.base.words import Set, Setting
from coprune.pruning.allocation.allocation import Curve, Shown, Unit, within_budget
from coprune.recipe.pattern import Target, parse_pattern

TOLERANCE = 1e-4
"""Maximum difference of the file's mean sparsity from the overall one, if it covers all matrices."""


@dataclass(frozen=True)
class ByFile:
    """Give matrices the sparsities in a file."""

    entries: tuple[tuple[str, float | str], ...]
    """Globs and sparsities (or N:M), in the file's order."""

    measures: ClassVar[bool] = False
    statistic: ClassVar[None] = None
    first: ClassVar[int] = 0

    @classmethod
    def read(cls, path: Path) -> ByFile:
        """Read a file. Raises BadInput if it is missing, not YAML, or not a mapping to sparsities."""
        data = read_yaml(path, "the allocation", "allocation")
        if not isinstance(data, dict) or not data:
            raise BadInput(
                f"the allocation {path} is not a mapping",
                field="allocation",
                value=path,
                fix="it should read like '\"*.v_proj\": 0.4'",
            )
        for glob, value in data.items():
            _check(path, glob, value)
        return cls(tuple(data.items()))

    def measure(self, shown: Sequence[Shown], target: Target) -> dict[str, Tensor]:
        return {}

    def allocate(self, units: Sequence[Unit], sums: Mapping[str, Tensor], target: Target) -> list[Target]:
        self._check_globs(units)
        wanted = [self._wanted(unit, target) for unit in units]
        total = sum(unit.weights for unit in units)
        named = sum(u.weights * s for u, s in zip(units, wanted, strict=True) if s is not None)
        free = sum(u.weights for u, s in zip(units, wanted, strict=True) if s is None)
        if free == 0 and abs(named / total - target.sparsity) > TOLERANCE:
            raise BadInput(
                f"the allocation's file gives a sparsity of {named / total:.5f} in all, but {target.sparsity:g} was "
                "requested",
                field="allocation",
                fix=("ask for ", Set("sparsity", round(named / total, 5)), ", or leave some matrices out of the file"),
            )
        rest = (target.sparsity * total - named) / free if free else target.sparsity
        if not 0 <= rest < 1:
            raise BadInput(
                f"the allocation's file leaves a sparsity of {rest:.3f} to the matrices that it does not name, if the overall "
                f"sparsity is to be {target.sparsity:g}",
                field="allocation",
                fix=("change the file or ", Setting("sparsity")),
            )
        curves = [
            _near(rest, unit, 1.0) if sparsity is None else _near(sparsity, unit, 0.0)
            for sparsity, unit in zip(wanted, units, strict=True)
        ]
        return within_budget(units, curves, target)

    def _wanted(self, unit: Unit, target: Target) -> float | None:
        for glob, value in self.entries:
            if _matches(unit, glob):
                return _sparsity_of(value, target)
        return None

    def _check_globs(self, units: Sequence[Unit]) -> None:
        for glob, _ in self.entries:
            if not any(_matches(unit, glob) for unit in units):
                raise BadInput(
                    f"the allocation's pattern {glob!r} matches none of the matrices to prune",
                    field="allocation",
                    value=glob,
                    fix=f"names look like {units[0].name!r}",
                )


def _near(sparsity: float, unit: Unit, reach: float) -> Curve:
    """Return the curve of a wanted sparsity that may be missed by at most `reach`, rounded to whole steps."""
    return Curve(lambda s: unit.weights * (s - sparsity) ** 2, max(0.0, sparsity - reach), min(1.0, sparsity + reach))


def _matches(unit: Unit, glob: str) -> bool:
    return fnmatchcase(unit.name, glob)


def _sparsity_of(value: float | str, target: Target) -> float:
    pattern = target.pattern
    if not isinstance(value, str):
        if pattern.n_of_m is not None and value < 0.5 / pattern.n_of_m[1]:
            raise BadInput(
                f"the allocation's sparsity {value:g} leaves a matrix whole, but {pattern} takes at least one of every "
                f"{pattern.n_of_m[1]}",
                field="allocation",
                value=value,
                fix=("leave such matrices out of the run with ", Setting("exclude")),
            )
        return float(value)
    named = parse_pattern(value)
    if named.sparsity is None or pattern.with_sparsity(named.sparsity) != named:
        raise BadInput(
            f"the allocation's {value} does not fit the pattern {pattern}",
            field="allocation",
            value=value,
            fix="give a sparsity or N of the same M",
        )
    return named.sparsity


def _check(path: Path, glob: Any, value: Any) -> None:
    """Raise BadInput unless this is a glob with a sparsity or N:M."""
    if not isinstance(glob, str):
        raise BadInput(
            f"the allocation {path} names {glob!r}, which is not a pattern of names", field="allocation", value=path
        )
    # YAML 1.1 reads an unquoted 3:8 as a base-60 number; quoted it stays a string.
    if isinstance(value, str):
        parse_pattern(value)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise BadInput(
            f"the allocation {path} gives {glob!r} the sparsity {value!r}, which must be 0 ≤ s < 1",
            field="allocation",
            value=path,
        )
