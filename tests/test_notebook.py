"""The notebook runs from top to bottom, here on a small model, and is kept without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support.page_blocks import ROOT
from support.page_world import make_base

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# What stands before the first cell: the small world of the pages, in the notebook's own process.
FIRST = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import pytest
from support.page_world import Base, World

World(Base(Path({base!r})), Path({folder!r}), pytest.MonkeyPatch())
"""


def smaller(source: str) -> str:
    """With fewer and shorter samples, and less to measure."""
    for name, value in {"nsamples": 2, "seqlen": 32, "tokens": 64, "eval_tokens": 64, "max_new_tokens": 4}.items():
        source = re.sub(rf"\b{name}=\d+", f"{name}={value}", source)
    return source


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_it_runs(file: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    make_base(tmp_path / "base")
    (tmp_path / "place").mkdir()
    first = FIRST.format(tests=str(ROOT / "tests"), base=str(tmp_path / "base"), folder=str(tmp_path / "place"))
    for cell in notebook.cells:
        cell.source = smaller(cell.source) if cell.cell_type == "code" else cell.source
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("text/html" in output.get("data", {}) for output in shown) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_it_runs_as_it_stands(file: Path, tmp_path: Path, smollm2_folder: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_it_is_kept_without_outputs(file: Path) -> None:
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
