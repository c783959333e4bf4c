"""The parts of a page as values: what they show; how they look is in `templates/`."""

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
from coprune.report.made import MadeFacts
from coprune.report.plot import Plot

Kind = Literal["dense", "pruned", "tuned"]
"""A model, by which what is shown of it is coloured."""
_MOST_LINES = 200  # of a list


@dataclass(frozen=True)
class Paragraph:
    """A paragraph. look: `soft` for what matters less, `warn` for what matters more."""

    text: str
    look: Literal["", "soft", "warn"] = ""


@dataclass(frozen=True)
class Link:
    """A link to a page that belongs to this one. target: its address as seen from this one."""

    target: str
    name: str


@dataclass(frozen=True)
class Copyable:
    """Text in a fixed-width box with a copy button."""

    name: str
    content: str

    def words(self) -> list[str]:
        """Return words and the spaces between: lines break between words, not at hyphens."""
        return [word for word in re.split(r"(\s+)", self.content) if word]


@dataclass(frozen=True)
class Card:
    """A headline figure. figures: one, or successive ones of which the last is the result."""

    label: str
    figures: Sequence[str]
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A figure as a bar. reach: an interval to draw over its end."""

    name: str
    kind: Kind
    value: float
    shown: str
    reach: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bars:
    """Groups of bars with titles. top: common maximum; by default each group ends at its largest figure."""

    groups: Sequence[tuple[str, Sequence[Bar]]]
    top: float | None = None

    def whole(self, group: Sequence[Bar]) -> float:
        """Return the figure at which the bars of a group end."""
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
        """Return the text with repeated lines counted, so that an endless answer stays short."""
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
    """Quotes that are shown on demand."""

    title: str
    parts: Sequence[Quotes]


@dataclass(frozen=True)
class Lines:
    """A list of texts."""

    lines: Sequence[str]

    def shown(self) -> Sequence[str]:
        """Return as many as a page holds."""
        return self.lines[:_MOST_LINES]


@dataclass(frozen=True)
class Image:
    """An image with its right class and those that two models see. uri: of its data."""

    uri: str
    number: int
    label: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Images:
    """Images beside each other."""

    images: Sequence[Image]


@dataclass(frozen=True)
class Curves:
    """Small plots beside each other."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Picker:
    """One of many matrices with its histograms, drawn by the page's script. charts: titles by kind; data: for the script."""

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
    """Return a section with a list, if there is anything in it."""
    return [Section(f"{title} ({len(lines):,})", [Lines(lines)])] if lines else []


def made_parts(made: MadeFacts) -> list[Part]:
    """Return date, machine and command."""
    command = Paragraph("Called from Python.", "soft") if made.command is None else Copyable("command", made.command)
    return [Paragraph(made.line(), "soft"), command]


@dataclass(frozen=True)
class Page:
    """A page: one self-contained file. title: of the file; heading: by default the same; kind: what it is of."""

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
        """Return the page with its styles and its script in it, and a policy that forbids requests."""
        assets = files("coprune.report") / "assets"
        style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        return render("report/templates/page.html.j2", page=self, style=style, script=script)
