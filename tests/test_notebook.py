"""The notebook runs from top to bottom, here on a small model, and is stored with the real model's outputs."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import coprune
from support.forking import forked
from support.page_blocks import ROOT
from support.page_world import World, make_base

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def smaller(source: str) -> str:
    """Return a cell with fewer and shorter samples, and less to measure."""
    for name, value in {"nsamples": 2, "samples": 4, "seqlen": 32, "eval_tokens": 64, "max_new_tokens": 4}.items():
        source = re.sub(rf"\b{name}=\d+", f"{name}={value}", source)
    return source


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_the_notebook_runs_on_a_small_model(file: Path, tmp_path: Path) -> None:
    """Runs in IPython's shell in this process, and in the small world of the pages."""
    sources = [smaller(cell.source) for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    (tmp_path / "place").mkdir()

    def run() -> None:
        from IPython.core.interactiveshell import InteractiveShell
        from traitlets.config import Config

        World(make_base(tmp_path / "base"), tmp_path / "place", pytest.MonkeyPatch())
        shell: Any = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
        tables = 0
        for source in sources:
            cell = shell.run_cell(source)
            cell.raise_error()
            tables += "text/html" in shell.display_formatter.format(cell.result)[0]
        assert tables >= 5

    assert os.waitpid(forked(run), 0)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_the_notebook_runs_unchanged(file: Path, tmp_path: Path, smollm2_folder: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


def code_of(file: Path) -> list[dict[str, Any]]:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_the_notebook_imports_public_names_only(file: Path) -> None:
    nodes = [node for cell in code_of(file) for node in ast.walk(ast.parse("".join(cell["source"])))]
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert [name for name in imported if name.startswith("coprune")] == ["coprune"]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "coprune"}
    assert len(used) > 5
    assert used <= set(coprune.__all__)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_the_notebook_is_stored_with_its_outputs(file: Path) -> None:
    cells = code_of(file)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [cell for cell in cells if cell["outputs"]]
    assert len(shown) >= len(cells) - 4  # except cells of imports and saving
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "error" not in kinds
    told = json.dumps([cell["outputs"] for cell in cells])
    assert not re.search(r"/(root|home|tmp|work|Users)/", told), "no folder of whoever ran it"
