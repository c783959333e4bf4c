"""Tables in pages match those that `benchmarks/tables.py` makes from `benchmarks/results/`."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = _script()


@pytest.mark.parametrize("page", TABLES.pages(), ids=lambda page: page.name)
def test_tables_in_pages_match_their_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == TABLES.with_tables(text), "run python benchmarks/tables.py"
    assert text.count("<!-- table: ") == text.count("<!-- end -->")


def test_a_table_has_the_requested_rows_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs.csv").write_text("method,seed,loss\na,0,1.5\na,1,\nb,0,2\n", encoding="utf-8")
    monkeypatch.setattr(TABLES, "RESULTS", tmp_path)
    assert TABLES.table("runs | method, loss | method=a").splitlines() == [
        "| method | loss |",
        "| --- | ---: |",
        "| a | 1.5 |",
        "| a | – |",
    ]
    with pytest.raises(ValueError, match="no column 'gain'"):
        TABLES.table("runs | gain")
    with pytest.raises(ValueError, match="no row"):
        TABLES.table("runs | loss | method=c")


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.csv")), ids=lambda file: file.stem)
def test_every_row_has_every_column(file: Path) -> None:
    header, *rows = csv.reader(file.read_text(encoding="utf-8").splitlines())
    assert rows
    assert all(len(row) == len(header) for row in rows)
