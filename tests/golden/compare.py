"""The file of golden figures, and comparison with it.

Every row names the arithmetic under which it was made, since rows may be updated on any machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprune.pruning.methods.wanda_variant import TOLERANCE as SEARCH_TOLERANCE
from golden.arithmetic import arithmetic
from golden.measure import Figures

FILE = Path(__file__).with_name("figures.json")

# Under another arithmetic. Methods that update weights as they go are chaotic in the last bits of their sums: between
# instruction sets, with and without kernels, layer errors of ALPS differed by 0.4 % and its perplexities by 3.5 %. Of a
# model that says noise, at 10^8, the perplexity differed by 28 %, which is 1.8 % of the nats per token.
TOLERANCE = 0.02
SEARCHED = "wanda_variant 50%"
"""Rows whose sparsity is not computed but found, by a search that ends at the first one that is near enough."""
BY = "by"
"""Field with the arithmetic of a row."""


@dataclass
class Golden:
    """The file's content: arithmetics by checksum, and figures by row name, each with its arithmetic's checksum."""

    arithmetics: dict[str, dict[str, str]]
    rows: dict[str, Figures]

    @classmethod
    def read(cls) -> Golden:
        """Read the file; empty if there is none."""
        return cls(**json.loads(FILE.read_text(encoding="utf-8"))) if FILE.exists() else cls({}, {})

    def write(self) -> None:
        """Write the file, one row per line, with the arithmetics in use."""
        used = {row[BY]: self.arithmetics[row[BY]] for row in self.rows.values()}
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(self.rows[name])}" for name in sorted(self.rows))
        text = f'{{\n"arithmetics": {json.dumps(used, sort_keys=True)},\n"rows": {{\n{rows}\n}}\n}}\n'
        FILE.write_text(text, encoding="utf-8")

    def with_rows(self, found: dict[str, Figures]) -> Golden:
        """Return a copy with rows measured here."""
        here = arithmetic()
        by = _checksum_of(here)
        own = {name: {**figures, BY: by} for name, figures in found.items()}
        return Golden(self.arithmetics | {by: here}, self.rows | own)

    def exact(self, name: str) -> bool:
        """Return whether a row's figures must be reproduced here to the last bit."""
        return self.arithmetics[self.rows[name][BY]] == arithmetic()

    def regime(self, name: str) -> str:
        """Describe how a row's figures are compared here."""
        if name not in self.rows:
            return "a new row"
        if self.exact(name):
            return "the arithmetic is that of the golden figures, so every bit counts"
        here, there = arithmetic(), self.arithmetics[self.rows[name][BY]]
        other = ", ".join(f"{key} {value}, here {here[key]}" for key, value in there.items() if here[key] != value)
        return (
            f"another arithmetic ({other}), so sparsity counts exactly unless it is searched, layer errors and nats per "
            f"token within {TOLERANCE:.0%}"
        )

    def differences(self, name: str, found: Figures) -> list[str]:
        """List the differences from a row's golden figures, one line each."""
        if name not in self.rows:
            return ["there is no golden row of this name"]
        golden, exact = self.rows[name], self.exact(name)
        return [
            f"{key}: golden {golden.get(key)!r}, now {found.get(key)!r}"
            for key in {**golden, **found}
            if key != BY and not _same(key, golden.get(key), found.get(key), exact, SEARCHED in name)
        ]


def _checksum_of(made: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]


def _same(key: str, golden: Any, found: Any, exact: bool, searched: bool) -> bool:
    if exact or golden is None or found is None or key in ("matrices", "refused"):
        return bool(golden == found)
    if key == "sparsity":
        return math.isclose(golden, found, rel_tol=0, abs_tol=SEARCH_TOLERANCE if searched else 0)
    if key in ("masks", "weights", "events"):
        return True
    shown = math.log if key == "perplexity" else float
    return len(golden) == len(found) and all(
        math.isclose(shown(a), shown(b), rel_tol=TOLERANCE, abs_tol=1e-9) for a, b in zip(golden, found, strict=True)
    )
