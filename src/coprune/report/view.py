"""The parts of a page as values; their look is in `templates/`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any, Literal

from coprune.base.templating import render
from coprune.base.words import Sheet
from coprune.report.heat_map import HeatMap
from coprune.report.plot import Plot
from coprune.report.provenance import MadeFacts

Kind = Literal["dense", "pruned", "tuned"]
"""A kind of model, which sets the colour."""
_MOST_LINES = 200  # in a list


@dataclass(frozen=True)
class Paragraph:
    """A paragraph. look: `soft` for minor text, `warn` for a warning."""

    text: str
    look: Literal["", "soft", "warn"] = ""


@dataclass(frozen=True)
class Link:
    """A link to a related page. target: its relative address."""

    target: str
    name: str


@dataclass(frozen=True)
class Copyable:
    """Text in a fixed-width box with a copy button."""

    name: str
    content: str

    def words(self) -> list[str]:
        """Return words and the spaces between them, so that lines break between words, not at hyphens."""
        return [word for word in re.split(r"(\s+)", self.content) if word]


@dataclass(frozen=True)
class Card:
    """A headline figure. figures: one, or a sequence whose last is the result."""

    label: str
    figures: Sequence[str]
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A figure as a bar. reach: an interval drawn over its end."""

    name: str
    kind: Kind
    value: float
    shown: str
    reach: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bars:
    """Groups of bars with titles. top: common maximum; by default each group's largest figure."""

    groups: Sequence[tuple[str, Sequence[Bar]]]
    top: float | None = None

    def whole(self, group: Sequence[Bar]) -> float:
        """Return the figure of a full-length bar in a group."""
        ends = [end for bar in group for end in (bar.value, *(bar.reach or ())) if math.isfinite(end)]
        return self.top or max(ends, default=1.0) or 1.0

    def share(self, value: float, whole: float) -> float:
        """Return the length of a bar in per cent."""
        return 100.0 if not math.isfinite(value) else 100 * min(1.0, max(0.0, value / whole))


@dataclass(frozen=True)
class Quote:
    """A model's text. tag: its title; prompt: what it continues."""

    kind: Kind
    tag: str
    content: str
    prompt: str = ""

    def said(self) -> str:
        """Return the text with repeated lines counted, so that a looping answer stays short."""
        lines = [line.rstrip() for line in self.content.splitlines() if line.strip()]
        groups = [(line, len(list(same))) for line, same in groupby(lines)]
        return "\n".join(line if count < 3 else f"{line}   [{count} times]" for line, count in groups)


@dataclass(frozen=True)
class Quotes:
    """Texts of several models side by side. asked: the prompt that they answer."""

    quotes: Sequence[Quote]
    asked: str = ""


@dataclass(frozen=True)
class Folded:
    """Quotes shown on demand."""

    title: str
    parts: Sequence[Quotes]


@dataclass(frozen=True)
class Lines:
    """A list of texts."""

    lines: Sequence[str]

    def shown(self) -> Sequence[str]:
        """Return the lines to show."""
        return self.lines[:_MOST_LINES]


@dataclass(frozen=True)
class Image:
    """An image with its true class and two predictions. uri: its data URI."""

    uri: str
    number: int
    label: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Images:
    """Images side by side."""

    images: Sequence[Image]


@dataclass(frozen=True)
class Curves:
    """Small plots side by side."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Picker:
    """A list of matrices with histograms, drawn by the page's script. charts: titles by kind; data: for the script."""

    charts: dict[str, str]
    data: dict[str, Any]


Part = Paragraph | Copyable | Bars | Quotes | Folded | Lines | Images | Curves | Picker | Sheet | Plot | HeatMap


@dataclass(frozen=True)
class Section:
    """A heading with its content."""

    title: str
    parts: Sequence[Part] = ()
    note: str = ""


def listed(title: str, lines: Sequence[str]) -> list[Section]:
    """Return a section with a list, if it is not empty."""
    return [Section(f"{title} ({len(lines):,})", [Lines(lines)])] if lines else []


def made_parts(made: MadeFacts) -> list[Part]:
    """Return date, machine and command."""
    command = Paragraph("Called from Python.", "soft") if made.command is None else Copyable("command", made.command)
    return [Paragraph(made.line(), "soft"), command]


@dataclass(frozen=True)
class Page:
    """A self-contained page. title: of the file; heading: the title by default; kind: what the page is about."""

    kind: str
    title: str
    lead: Sequence[Part]
    sections: Sequence[Section]
    cards: Sequence[Card] = ()
    links: Sequence[Link] = ()
    heading: str = ""

    def data(self) -> dict[str, Any]:
        """Return the data of the page's script."""
        return next((part.data for one in self.sections for part in one.parts if isinstance(part, Picker)), {})

    def html(self) -> str:
        """Return the page with inlined styles and script, and a policy that forbids requests."""
        assets = files("coprune.report") / "assets"
        style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        return render("report/templates/page.html.j2", page=self, style=style, script=script)
