"""Update the golden figures, or compare with them: python tests/golden/make_golden.py [--check] [--only PREFIX]."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from golden.compare import FILE, Golden
from golden.measure import Figures, Workbench
from golden.rows import Row, all_rows


def main() -> int:
    """Measure the rows, compare, and write unless checking; return 1 if a check finds differences or a row fails."""
    options = _options()
    golden = Golden.read()
    rows = all_rows()
    chosen = [row for name, row in rows.items() if name.startswith(options.only)]
    if not chosen:
        print(f"no row starts with {options.only!r}")
        return 1
    found, different = _measure(chosen, golden)
    gone = sorted(name for name in golden.rows if name.startswith(options.only) and name not in rows)
    print(f"{len(chosen)} rows, {len(different)} of them different, {len(gone)} golden rows of no run.")
    for name in (*different, *gone):
        print(f"  {name}")
    if options.check:
        return 1 if different or gone else 0
    kept = {name: figures for name, figures in golden.rows.items() if name not in gone}
    Golden(golden.arithmetics, kept).with_rows(found).write()
    print(f"written to {FILE}")
    return 0 if len(found) == len(chosen) else 1


def _measure(chosen: Sequence[Row], golden: Golden) -> tuple[dict[str, Figures], list[str]]:
    """Return the rows' figures, and the names of those that differ or fail; print a line per row."""
    found: dict[str, Figures] = {}
    different = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(Path(folder))
        for number, row in enumerate(chosen, 1):
            started = time.perf_counter()
            try:
                found[row.name] = bench.measure(row)
                lines = golden.differences(row.name, found[row.name])
            except Exception:  # a failing row does not affect the others
                lines = traceback.format_exc().splitlines()
            seconds = time.perf_counter() - started
            print(
                f"[{number:3}/{len(chosen)}] {row.name:<52} {seconds:6.2f} s{'  DIFFERS' if lines else ''}", flush=True
            )
            if lines:
                different.append(row.name)
                for line in (golden.regime(row.name), *lines):
                    print(f"          {line}")
    return found, different


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make or check the golden figures.")
    parser.add_argument("--check", action="store_true", help="compare only; exit with 1 if something differs")
    parser.add_argument("--only", default="", metavar="PREFIX", help="only rows whose names start so")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
