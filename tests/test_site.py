"""The documentation site: every page is in the navigation, and generated pages are complete. `make site` builds it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_pages
import diagrams
import pytest
import yaml

import coprune
from coprune.commands.command_table import COMMANDS
from coprune.recipe.tree import LEAVES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def pages(entries: list[Any]) -> Iterator[str]:
    """Yield the files in a navigation."""
    for entry in entries:
        for below in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [below] if isinstance(below, str) else pages(below)


def test_every_page_is_in_the_nav_once() -> None:
    nav = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = [file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")]
    assert sorted(nav) == sorted([*there, "log.md", "changelog.md"])  # two pages from the root folder


def sections() -> dict[str, str]:
    """Return the section of every command on the page."""
    told = command_pages.all_commands().split("## coprune ")[1:]
    return dict(part.split("\n", 1) for part in told)


def test_the_page_of_commands_has_every_command_with_every_option() -> None:
    told = sections()
    assert list(told) == list(COMMANDS)
    for name, command in command_pages.commands().items():
        for parameter in command.params:
            flags = [flag for flag in parameter.opts if flag.startswith("--")]
            hidden = getattr(parameter, "hidden", False)
            assert hidden or not flags or any(flag in told[name] for flag in flags), (name, flags)


def test_the_page_of_recipes_has_every_setting() -> None:
    told = command_pages.all_settings()
    assert command_pages.SETTINGS_MARKER in (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert all(f"`{word}`" in told for word in LEAVES)


@pytest.mark.parametrize(
    ("command", "entry"),
    [
        (
            "prune",
            "`-m, --method <str>`\n:   Pruning method; coprune methods lists them. "
            "Default: sparsegpt by preset balanced, else wanda.",
        ),
        ("prune", "`--seed <int>`\n:   Random seed. Default: 0."),
        (
            "prune",
            "`-s, --sparsity <str>`\n:   Fraction of zeros, 0 ≤ s &lt; 1, or 50%; an N:M pattern sets it. Default: 0.5.",
        ),
        (
            "push",
            "`folder <path>`\n:   Folder of a saved model, of adapters, or of a run that saved its model. **Required.**",
        ),
        ("bench", "`--repeats <int range>`\n:   Measurements of the prompt. Default: 5."),
    ],
)
def test_an_option_has_its_default_and_help(command: str, entry: str) -> None:
    assert entry + "\n" in sections()[command]


def test_the_api_has_every_public_name_once() -> None:
    lines = (DOCS / "api.md").read_text(encoding="utf-8").splitlines()
    assert sorted(line.removeprefix("::: coprune.") for line in lines if line.startswith(":::")) == coprune.__all__


@pytest.mark.parametrize("name", diagrams.DRAWINGS)
def test_pictures_match_their_scripts(name: str) -> None:
    assert (DOCS / "diagrams" / name).read_text(encoding="utf-8") == diagrams.DRAWINGS[name]().svg()


def test_the_changelog_starts_with_the_present_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changes.split("\n## ")[1].split()[0] == version
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
