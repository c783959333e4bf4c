"""Count a piece of code's operations on the simulated device, by line of coprune."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from support.simdevice import NAME, SIMULATED

KINDS = ("launch", "sync", "to_device", "to_host")
"""Kinds: operators on the device, waits of the host for it, copies from and to the host."""


class Asked(NamedTuple):
    """The operations of one line by one operator."""

    kind: str
    line: str
    operator: str
    calls: int
    size: int
    """Bytes copied."""


class Counting:
    """A context in which coprune's operations on the device are counted."""

    def __enter__(self) -> Counting:
        from support.simdevice.device import library

        library.sim_count(1, b"coprune/")
        return self

    def __exit__(self, *_: object) -> None:
        from support.simdevice.device import library

        library.sim_count(0, b"coprune/")
        told = library.sim_counts().decode()
        rows = [line.rsplit("|", 2) for line in told.splitlines()]
        parts = [(*key.split("|", 2), int(calls), int(size)) for key, calls, size in rows]
        self.asked = [Asked(kind, line, operator, calls, size) for kind, line, operator, calls, size in parts]

    @property
    def totals(self) -> Counter[str]:
        """Return the calls by kind."""
        found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        for row in self.asked:
            found[row.kind] += row.calls
        return found

    def lines(self, kind: str, most: int = 12) -> list[str]:
        """Return the lines with the most operations of a kind, with counts and operators."""
        calls: Counter[str] = Counter()
        operators: dict[str, set[str]] = {}
        for row in self.asked:
            if row.kind == kind:
                calls[row.line] += row.calls
                operators.setdefault(row.line, set()).add(row.operator.removeprefix("aten::"))
        return [f"{count:6} {line}  {', '.join(sorted(operators[line]))}" for line, count in calls.most_common(most)]


def counted(work: Callable[[], object]) -> dict[str, int]:
    """Return the operations of some work by kind; on a real device only waits."""
    if NAME != SIMULATED:
        return dict.fromkeys(KINDS, 0) | {"sync": sum(waits_of(work).values())}
    with Counting() as counting:
        work()
    return {kind: counting.totals[kind] for kind in KINDS}


def waits_of(work: Callable[[], object]) -> Counter[str]:
    """Return the lines that make the host wait for a CUDA device, by its debug mode, with counts."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = [warning for warning in heard if "synchronizing CUDA operation" in str(warning.message)]
    return Counter(f"{warning.filename.rpartition('coprune/')[2]}:{warning.lineno}" for warning in told)
