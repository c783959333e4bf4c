"""The frame of every page: one self-contained file, with styles and a small script in it and a policy that forbids requests."""

from __future__ import annotations

import functools
import html
import json
import math
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from coprune.base.environment import installed_version, typed_command, usable_cores

# The page's own script and styles run; nothing can be loaded from anywhere.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
_MANY = 9  # columns beyond which a printed table wraps within its cells
_STACKED = 24  # a table of at most so many rows becomes a list of cards on a phone; a longer one scrolls


def page(title: str, body: str, data: dict[str, Any] | None = None) -> str:
    """Return a whole page. body: HTML; data: for page.js, see `matrices.picker_data`."""
    assets = files("coprune.report") / "assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = (assets / "page.js").read_text(encoding="utf-8")
    # "<" is escaped, so that no name can end the element.
    payload = json.dumps(data or {}, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    payload = payload.replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="data">{payload}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def header(kind: str, title: str, lead: str, made: str, links: Sequence[str] = ()) -> str:
    """Return the top of a page.

    Args:
        kind: what the page is of, such as `Pruning run`; a plain text.
        title: plain text.
        lead: HTML below it.
        made: HTML of when, where and by what it was made (`made_lines`).
        links: to pages that belong to it, HTML.
    """
    return f'<header><nav>{"".join(links)}</nav><p class="kind">{text(kind)}</p><h1>{text(title)}</h1>{lead}{made}</header>'


def made_lines(made: MadeFacts) -> str:
    """Return date, machine and command as HTML."""
    typed = '<p class="soft">Called from Python.</p>' if made.command is None else copyable("command", made.command)
    return f'<p class="soft">{text(made.line())}</p>{typed}'


def text(value: object) -> str:
    """Escape a value for HTML."""
    return html.escape(str(value))


def card(label: str, figure: str, note: str = "") -> str:
    """Return a headline figure; label and note are plain text, figure is HTML."""
    below = f'<div class="note">{text(note)}</div>' if note else ""
    return f'<div class="card"><div class="label">{text(label)}</div><div class="figure">{figure}</div>{below}</div>'


def from_to(figures: Sequence[str]) -> str:
    """Return successive figures of a card with arrows between; the last is the result."""
    return "".join(f'<span class="from">{text(figure)} →</span> ' for figure in figures[:-1]) + text(figures[-1])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], links: Sequence[str | None] = ()) -> str:
    """Return a table of plain texts. links: of the first cell of each row, None for none."""
    stacked = len(header) > 3 and len(rows) <= _STACKED
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    targets = [*links, *[None] * (len(rows) - len(links))]
    lines = "".join(_line(header if stacked else (), row, to) for row, to in zip(rows, targets, strict=True))
    kinds = " ".join(["stacked"] * stacked + ["many"] * (len(header) > _MANY))
    kind = f' class="{kinds}"' if kinds else ""
    shown = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return panel(shown, whole=len(rows) <= _STACKED)


def _line(names: Sequence[str], row: Sequence[str], target: str | None) -> str:
    """Return a row of a table. names: of its columns, which a phone shows beside the cells."""
    cells = [text(cell) for cell in row]
    if target is not None:
        cells[0] = link(target, row[0])
    of = [f' data-of="{text(name)}"' for name in names[1:]] or [""] * (len(cells) - 1)
    others = "".join(f"<td{name}>{cell}</td>" for name, cell in zip(of, cells[1:], strict=True))
    return f"<tr><td>{cells[0]}</td>{others}</tr>"


def link(target: str, name: str) -> str:
    """Return a link within the folder of the page."""
    return f'<a href="{text(target)}">{text(name)}</a>'


def panel(*parts: str, whole: bool = True) -> str:
    """Return a frame around charts, or a list. whole: whether it fits a printed page, so that it is not cut there."""
    return f'<div class="{"panel whole" if whole else "panel"}">{"".join(parts)}</div>'


def section(title: str, *parts: str, note: str = "") -> str:
    """Return a heading with its content; note is plain text."""
    below = f'<p class="soft">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{below}{''.join(parts)}</section>"


def copyable(name: str, content: str) -> str:
    """Return text in a fixed-width box with a copy button; lines break between words, not at hyphens."""
    words = "".join(f"<span>{text(part)}</span>" if part.strip() else part for part in re.split(r"(\s+)", content))
    return (
        f'<div class="withcopy"><pre id="{text(name)}">{words}</pre>'
        f'<button type="button" data-copy="{text(name)}">Copy</button></div>'
    )


def quote(kind: str, tag: str, content: str, prompt: str = "") -> str:
    """Return a model's text in a panel. kind: `dense`, `pruned` or `tuned`, its colour; tag: its title."""
    before = f'<span class="prompt">{text(prompt)}</span> ' if prompt else ""
    said = f"<blockquote>{before}{text(_told(content))}</blockquote>"
    return f'<div class="panel"><div class="tag {kind}">{text(tag)}</div>{said}</div>'


def _told(content: str) -> str:
    """Return a model's text with repeated lines counted, so that an endless answer stays short."""
    lines = [line.rstrip() for line in content.splitlines() if line.strip()]
    groups = [(line, len(list(same))) for line, same in groupby(lines)]
    return "\n".join(line if count < 3 else f"{line}   [{count} times]" for line, count in groups)


def listed(title: str, lines: Sequence[str], most: int = 200) -> str:
    """Return a section with a list of plain texts, empty without any. most: maximum number shown."""
    if not lines:
        return ""
    items = "".join(f"<li>{text(line)}</li>" for line in lines[:most])
    rest = f"<li>and {len(lines) - most:,} more, in report.json</li>" if len(lines) > most else ""
    return section(f"{title} ({len(lines):,})", panel(f'<ul class="events">{items}{rest}</ul>', whole=False))


def seconds(value: float) -> str:
    """Return a time in a fitting unit."""
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def short(count: int) -> str:
    """Return a number of weights: 134.5 M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g} {letter}"
    return str(count)


@dataclass(frozen=True)
class Bar:
    """A figure. kind: `dense`, `pruned` or `tuned`, by which it is coloured; reach: an interval to draw over its end."""

    name: str
    kind: str
    value: float
    shown: str
    reach: tuple[float, float] | None = None


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], top: float | None = None) -> str:
    """Return groups of bars with titles.

    top: common maximum of all bars; by default each group ends at its largest figure, for groups that do not compare.
    """
    return panel('<div class="bars">', *(_group(title, group, top) for title, group in groups if group), "</div>")


def _group(title: str, group: Sequence[Bar], top: float | None) -> str:
    ends = [end for bar in group for end in (bar.value, *(bar.reach or ())) if math.isfinite(end)]
    whole = top or max(ends, default=1.0) or 1.0
    rows = "".join(_bar(bar, whole) for bar in group)
    return f'<div class="group"><div class="of">{text(title)}</div>{rows}</div>'


def _bar(bar: Bar, whole: float) -> str:
    reach = ""
    if bar.reach is not None:
        low, high = (_share(end, whole) for end in bar.reach)
        reach = f'<b style="left:{low:.1f}%;width:{high - low:.1f}%"></b>'
    length = _share(bar.value, whole)
    return (
        f'<span class="tag {bar.kind}">{text(bar.name)}</span><div class="track">'
        f'<i class="{bar.kind}" style="width:{length:.1f}%"></i>{reach}</div><span class="value">{text(bar.shown)}</span>'
    )


def _share(value: float, whole: float) -> float:
    return 100.0 if not math.isfinite(value) else 100 * min(1.0, max(0.0, value / whole))


# The file that a package carries a model of the Hub in, as `locate` writes it; folders may hold spaces and parentheses.
_CARRIED = re.compile(r" \([^()/]+\.gguf\)$")


def base_of(source: str) -> str:
    """Return a source without the file in a package: a path, or a name on the Hub."""
    return _CARRIED.sub("", source)


def name_of(source: str) -> str:
    """Return the last part of a source."""
    return base_of(source).rstrip("/").rpartition("/")[2]


class MadeFacts(BaseModel):
    """Date, machine, command and version."""

    model_config = ConfigDict(frozen=True)

    date: datetime
    """Date of the measurements, in UTC."""
    machine: str
    command: str | None
    """Command line of the run; None for a call from Python."""
    version: str
    """Version of coprune; empty where it is not installed."""
    commit: str | None = None
    """Commit of coprune, if it runs from a git checkout; with `-dirty` if files differ from it."""

    @classmethod
    def here(cls) -> Self:
        """Describe this process."""
        cores = usable_cores()
        machine = f"{platform.system()} {platform.machine()}, {cores} core{'s' if cores > 1 else ''}"
        return cls(
            date=datetime.now(UTC).replace(microsecond=0),
            machine=machine,
            command=typed_command(),
            version=installed_version("coprune") or "",  # none where it runs from its sources
            commit=commit_of(Path(__file__).parents[3]),
        )

    def line(self) -> str:
        """Return date, machine, version and commit as a line."""
        return f"{self.date:%Y-%m-%d %H:%M} UTC, on {self.machine}{self._software()}"

    def _software(self) -> str:
        commit = "" if self.commit is None else f" (commit {self.commit})"
        return f", with coprune {self.version}{commit}" if self.version or commit else ""


def of_several(known: Sequence[MadeFacts]) -> str:
    """Return dates, machines and versions of several runs in one line."""
    first, last = (f"{found(one.date for one in known):%Y-%m-%d %H:%M}" for found in (min, max))
    when = f"{first} UTC" if first == last else f"{first} to {last} UTC"
    with_what = " and ".join(dict.fromkeys(f"on {one.machine}{one._software()}" for one in known))
    return f"{when}, {with_what}"


@functools.cache
def commit_of(checkout: Path) -> str | None:
    """Return the checked-out commit of a folder, or None without a checkout or git."""
    if not (checkout / ".git").exists():
        return None
    # Without locks, so as not to disturb other work in the checkout.
    describe = ["git", "--no-optional-locks", "-C", str(checkout), "describe"]
    describe += ["--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return found or None
