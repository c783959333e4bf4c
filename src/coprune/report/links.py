"""Relative links between related pages, only to pages that exist."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from coprune.base.files import write_text
from coprune.base.templating import macro
from coprune.report.view import Link

PAGE_FILE = "report.html"
SWEEP_FILE = "sweep.yaml"
FINETUNE_FOLDER = "train"
_NAV = "<nav>"


def target(page: Path, beside: Path) -> str | None:
    """Return the address of a page as seen from the folder `beside`, or None if it does not exist."""
    if not page.is_file():
        return None
    return quote(os.path.relpath(page.absolute(), beside.absolute()).replace(os.sep, "/"))


def links_of_run(folder: Path, beside: Path) -> list[Link]:
    """Return links from the page of a run to its sweep and its fine-tuning."""
    sweep = next((parent for parent in folder.absolute().parents if (parent / SWEEP_FILE).is_file()), None)
    found = [] if sweep is None else [_link(sweep / PAGE_FILE, beside, f"The sweep {sweep.name}")]
    found.append(_link(folder / FINETUNE_FOLDER / PAGE_FILE, beside, "Its fine-tuning"))
    return [one for one in found if one is not None]


def links_of_finetuning(folder: Path, model: Path) -> list[Link]:
    """Return a link from the page of a fine-tuning to the run that pruned its model, if its page is found next to either."""
    places = [folder.parent] if folder.name == FINETUNE_FOLDER else []
    for place in [*places, model, model.parent]:
        if (place / "report.json").is_file() and (one := _link(place / PAGE_FILE, folder, "The pruning")) is not None:
            return [one]
    return []


def link_back(page: Path, to: Path, name: str) -> None:
    """Add a link to a later page to an existing page that lacks it."""
    address = target(to, page.parent)
    if address is None or not page.is_file():
        return
    added = macro("report/templates/parts.html.j2", "link", Link(address, name))
    written = page.read_text(encoding="utf-8")
    if added not in written:
        write_text(page, written.replace(_NAV, _NAV + added, 1))


def _link(page: Path, beside: Path, name: str) -> Link | None:
    address = target(page, beside)
    return None if address is None else Link(address, name)
