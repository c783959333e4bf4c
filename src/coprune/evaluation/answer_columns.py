"""Figures of answers, in the table of compared models."""

from __future__ import annotations

from coprune.evaluation.answers.answered import Way
from coprune.evaluation.changes import Row
from coprune.evaluation.columns import Column, Number, plain, share

_FIGURES = {
    "loops": ("answers that loop", "{}"),
    "empty": ("answers that are empty", "{}"),
    "ended": ("answers that end", "{}"),
    "tokens": ("tokens per answer", "{:.1f}"),
    "distinct2": ("distinct-2", "{:.3f}"),
    "repeat": ("longest repeat", "{}"),
    "seconds": ("seconds per answer", "{:.2f}"),
}
_LIKENESS = {"agreed": "tokens that agree", "script": "same script"}


def answer_columns(sampled: bool, against: bool) -> list[Column]:
    """The columns. sampled: whether answers were sampled too; against: whether there is a model beside the baseline."""
    columns = _columns("greedy", against)
    if against:
        columns.append(plain("KL along answers", _kl, "{:.4f}"))
    return columns + (_columns("sampled", against) if sampled else [])


def _kl(row: Row) -> Number:
    facts = row.evaluation.answers
    return None if facts is None or facts.along is None else facts.along.kl


def _columns(name: str, against: bool) -> list[Column]:
    def way(row: Row) -> Way | None:
        facts = row.evaluation.answers
        return None if facts is None else facts.greedy if name == "greedy" else facts.sampled

    def figure(field: str, title: str, form: str) -> Column:
        def value(row: Row) -> Number:
            found = way(row)
            return None if found is None else getattr(found.figures, field)

        return plain(f"{title}, {name}", value, form)

    def likeness(field: str, title: str) -> Column:
        def value(row: Row) -> Number:
            found = way(row)
            return None if found is None or found.likeness is None else getattr(found.likeness, field)

        return share(f"{title}, {name}", value, 1)

    columns = [figure(field, *shown) for field, shown in _FIGURES.items()]
    return columns + ([likeness(field, title) for field, title in _LIKENESS.items()] if against else [])
