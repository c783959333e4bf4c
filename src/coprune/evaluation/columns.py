"""A figure of compared models: as a bare number and for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coprune.base.shown import per_cent
from coprune.evaluation.changes import Row

Number = float | int | None


@dataclass(frozen=True)
class Column:
    """One figure of every row. value: the bare number; show: the number for people."""

    title: str
    value: Callable[[Row], Number]
    show: Callable[[Row], str]


def plain(title: str, value: Callable[[Row], Number], form: str) -> Column:
    """A column whose number people see in one form. form: as of `str.format`."""

    def show(row: Row) -> str:
        number = value(row)
        return "" if number is None else form.format(number)

    return Column(title, value, show)


def share(title: str, value: Callable[[Row], Number], digits: int = 2) -> Column:
    """A column of shares, which people see in per cent."""

    def show(row: Row) -> str:
        number = value(row)
        return "" if number is None else per_cent(number, digits)

    return Column(title, value, show)
