"""Write the tables of the documentation from the figures in `benchmarks/results/`.

    python benchmarks/tables.py           # write them into the pages
    python benchmarks/tables.py --check   # exit with 1 where a page holds something else

A page has a table between two comments, of which the first says what it holds:

    <!-- table: presets-smollm2 | pattern, method, Wikipedia | pattern=2:4 & method=sparsegpt, balanced -->
    <!-- end -->

that is: the file, its columns (default: all), and its rows (default: all).
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_TABLE = re.compile(r"(?P<asked><!-- table: (?P<spec>.+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def main() -> int:
    """Write or check every page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page differs")
    check = parser.parse_args().check
    stale = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = with_tables(before)
        if before != after:
            stale.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(after, encoding="utf-8")
    if check and stale:
        print(f"run python benchmarks/tables.py: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str) -> str:
    """Return a page's text with its tables rewritten."""
    return _TABLE.sub(lambda found: f"{found['asked']}\n{table(found['spec'])}\n\n{found['end']}", text)


def table(spec: str) -> str:
    """Return one table as Markdown.

    Args:
        spec: file, columns and rows, as in the module's docstring.

    Raises:
        ValueError: a column is unknown, or no row is left.
    """
    name, columns, rows = (part.strip() for part in (*spec.split("|"), "", "")[:3])
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        known = list(csv.DictReader(file))
    shown = [column.strip() for column in columns.split(",")] if columns else list(known[0])
    chosen = [row for row in known if _is_asked_for(row, rows)]
    if unknown := [column for column in shown if column not in known[0]]:
        raise ValueError(f"{name}.csv has no column {unknown[0]!r}")
    if not chosen:
        raise ValueError(f"no row of {name}.csv has {rows}")
    lines = [shown, ["---:" if _is_number(chosen, column) else "---" for column in shown]]
    lines += [[row[column] or "–" for column in shown] for row in chosen]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_asked_for(row: dict[str, str], rows: str) -> bool:
    for condition in rows.split("&") if rows else ():
        column, _, values = (part.strip() for part in condition.partition("="))
        if row[column] not in [value.strip() for value in values.split(",")]:
            return False
    return True


def _is_number(rows: list[dict[str, str]], column: str) -> bool:
    return all(re.match(r"[\d–-]", row[column] or "–") for row in rows) and column not in ("pattern", "measured")


if __name__ == "__main__":
    sys.exit(main())
