"""mkdocs hooks: files of the root become pages, and some parts are made from the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OF_THE_ROOT = {"log.md": "LOG.md", "changelog.md": "CHANGELOG.md"}
"""Pages that are files of the root, where GitHub and readers of a source distribution expect them."""
_FILE_NAME = re.compile(r"\[(?:docs/)?([\w/-]+\.md)\]\(")
RESULTS = "<!-- the results in README.md -->"
"""The comment in `results.md` that they replace."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the root."""
    for page, name in OF_THE_ROOT.items():
        files.append(File.generated(config, page, content=_of_the_root(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert the generated parts of a page, and show links to other pages by title instead of file name."""
    made = {
        "commands.md": (command_pages.MARKER, command_pages.all_commands),
        "recipe.md": (command_pages.SETTINGS_MARKER, command_pages.all_settings),
        "results.md": (RESULTS, _results),
    }
    if page.file.src_uri in made:
        marker, make = made[page.file.src_uri]
        if marker not in markdown:
            raise PluginError(f"{page.file.src_uri} has no line {marker}")
        markdown = markdown.replace(marker, make())
    titles = dict(_titles(config.nav))
    return _FILE_NAME.sub(lambda link: f"[{titles.get(link[1], link[1])}](", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep short code and every option on one line, since browsers break lines after hyphens."""
    html = re.sub(r"<code>([^<\n]{1,24})</code>", r'<code class="short">\1</code>', html)
    return re.sub(r"<code>.*?</code>", lambda code: _whole_options(code[0]), html, flags=re.DOTALL)


def _whole_options(code: str) -> str:
    """Mark the options in a piece of code, outside its tags."""
    return re.sub(r"(?<![\w<&;/-])--?[a-z][\w-]*(?![^<]*>)", r'<span class="short">\g<0></span>', code)


def _titles(entries: Any) -> Iterator[tuple[str, str]]:
    """Return the pages of the nav with their titles."""
    for entry in entries:
        for title, below in entry.items() if isinstance(entry, dict) else ():
            if isinstance(below, str):
                yield below, title
            else:
                yield from _titles(below)


def _of_the_root(name: str) -> str:
    """Return a file of the root, with its links relative to docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)


def _results() -> str:
    """Return the section "Results" of README.md."""
    found = re.search(r"^## Results\n(.*?)(?=^## )", _of_the_root("README.md"), re.DOTALL | re.MULTILINE)
    if found is None:
        raise PluginError('README.md has no part "Results"')
    return found[1]
