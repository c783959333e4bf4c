"""The result of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coprune.base.words import Sheet, Shown

PAGE_FILE = "report.html"
DENSE, PLAIN, OURS, CHOSEN = range(4)
"""Series of the plot."""


@dataclass(frozen=True)
class Row:
    """A candidate in tables and the plot."""

    name: str
    plain: bool
    chosen: bool
    cost: float
    """Bytes, or tokens per second."""
    bytes: int
    speed: float
    refused: str
    part: str
    """Half of the items that it was last judged on."""
    verdict: str
    mean: float | None = None
    """Margin of the first condition; `low` and `high` are its bounds."""
    low: float | None = None
    high: float | None = None
    foreign: bool = False
    """Whether it is a given file."""

    @property
    def bounds(self) -> tuple[float, ...]:
        """Lower bound, mean and upper bound of the margin; empty if it was not measured."""
        return () if self.mean is None or self.low is None or self.high is None else (self.low, self.mean, self.high)

    @property
    def series(self) -> int:
        """Series in the plot."""
        return CHOSEN if self.chosen else DENSE if self.name.startswith("dense") else PLAIN if self.plain else OURS


@dataclass(frozen=True, repr=False)
class Fitted(Shown):
    """The result of a fit."""

    file: Path
    """The model: a GGUF file, or a folder."""
    bytes: int
    kept: bool
    """Whether the unseen half proves that all requirements are met."""
    chosen: str
    lines: tuple[str, ...]
    """The verdicts on the unseen half."""
    rows: tuple[Row, ...]
    """All candidates, the dense model first."""
    plain: str | None
    """The best plain quant that passed."""
    notes: tuple[str, ...] = ()
    given_bytes: int = 0
    """Bytes of the given model."""
    better: bool = True
    """Whether the file is better than the given model, which is returned if nothing better is proven."""

    next: str = ""
    """The command that continues with more time, if there is more to try."""

    @property
    def verdict(self) -> str:
        """The result in words."""
        return "kept" if self.kept else "not kept" if self.better else "nothing better is proven"

    @property
    def page(self) -> Path:
        """The report."""
        return self.file.with_name(PAGE_FILE)

    def headline(self) -> str:
        """Return the chosen model and whether its requirements are proven."""
        return f"{self.file}: {self.chosen}, {self.bytes:,} bytes, {self.verdict.upper() if not self.kept else self.verdict}"

    def sheet(self) -> Sheet:
        """Return the verdict with its figures."""
        size = f"{self.bytes:,} bytes, {self.bytes / self.given_bytes:.2f} of the {self.given_bytes:,} that were given"
        rows = [("chosen", self.chosen), ("file", f"{self.file}, {size}"), ("page", str(self.page))]
        rows += [("note", note) for note in self.notes]
        rows += [("unseen", line) for line in self.lines]
        rows.append(("verdict", self.verdict))
        rows += [("next", self.next)] if self.next else []
        return Sheet(self.headline(), rows)
