"""How often a stretch of code asks something of the simulated device, and from which line of coprune."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from support.simdevice.device import library

KINDS = ("launch", "sync", "to_device", "to_host")
"""Operators that run on the device; waits of the host for it; copies from the host and to it."""


class Asked(NamedTuple):
    """What one line asked by one operator."""

    kind: str
    line: str
    operator: str
    calls: int
    size: int
    """In bytes, of what was copied."""


class Counting:
    """While it is entered, what coprune asks of the device is counted."""

    def __enter__(self) -> Counting:
        library.sim_count(1, b"coprune/")
        return self

    def __exit__(self, *_: object) -> None:
        library.sim_count(0, b"coprune/")
        told = library.sim_counts().decode()
        rows = [line.rsplit("|", 2) for line in told.splitlines()]
        parts = [(*key.split("|", 2), int(calls), int(size)) for key, calls, size in rows]
        self.asked = [Asked(kind, line, operator, calls, size) for kind, line, operator, calls, size in parts]

    @property
    def totals(self) -> Counter[str]:
        """Calls by kind."""
        found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        for row in self.asked:
            found[row.kind] += row.calls
        return found

    def lines(self, kind: str, most: int = 12) -> list[str]:
        """The lines that ask for most of a kind, with how often and by which operators."""
        calls: Counter[str] = Counter()
        operators: dict[str, set[str]] = {}
        for row in self.asked:
            if row.kind == kind:
                calls[row.line] += row.calls
                operators.setdefault(row.line, set()).add(row.operator.removeprefix("aten::"))
        return [f"{count:6} {line}  {', '.join(sorted(operators[line]))}" for line, count in calls.most_common(most)]
