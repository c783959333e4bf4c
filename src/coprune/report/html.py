"""The frame of every page: one self-contained file, with styles and scripts in it and a policy that forbids requests."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import vl_convert

# Vega compiles its expressions, hence unsafe-eval; nothing can be loaded from anywhere.
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, body: str, data: dict[str, Any]) -> str:
    """Put a page together.

    body: HTML; data: what page.js reads: `charts` (element to Vega-Lite specification), `matrices`, `distributions`.
    """
    assets = files("coprune.report") / "assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = (assets / "page.js").read_text(encoding="utf-8")
    # "<" never stands in the data as such, so that no name can end the element.
    payload = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="data">{payload}</script>\n'
        f"<script>{_vega()}</script>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script."""
    bundle: str = vl_convert.javascript_bundle(None)  # type: ignore[arg-type]  # its stub forgets that it may be None
    return bundle.replace("</script", "<\\/script")


def text(value: object) -> str:
    """Escape a value for HTML."""
    return html.escape(str(value))


def card(label: str, figure: str, note: str = "") -> str:
    """A headline figure; label and note are plain text, figure is HTML."""
    below = f'<div class="note">{text(note)}</div>' if note else ""
    return f'<div class="card"><div class="label">{text(label)}</div><div class="figure">{figure}</div>{below}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="panel"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def chart(name: str) -> str:
    """A place for a chart."""
    return f'<div class="panel"><div class="chart" id="{text(name)}"></div></div>'


def section(title: str, *parts: str, note: str = "") -> str:
    """A heading with what belongs under it; note is plain text."""
    below = f'<p class="soft">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{below}{''.join(parts)}</section>"


def copyable(name: str, content: str) -> str:
    """Text in a fixed-width box with a button that copies it."""
    return (
        f'<div class="withcopy"><pre id="{text(name)}">{text(content)}</pre>'
        f'<button type="button" data-copy="{text(name)}">Copy</button></div>'
    )
