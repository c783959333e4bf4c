"""The section of a run's page with what `coprune bench` measured, if the run's folder holds it."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coprune.base.errors import BadInput
from coprune.base.words import Command, Set
from coprune.packed.benched import Bench, Row
from coprune.report.html import section, table

BENCH_FILE = "bench.json"
_BENCH = TypeAdapter(Bench)


def speed_sections(folder: Path) -> list[str]:
    """HTML of the figures in a run's folder, none if it has none. Raises BadInput if they are not bench's."""
    file = folder / BENCH_FILE
    if not file.is_file():
        return []
    try:
        found = _BENCH.validate_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        measured = Command("bench", "MODEL", Set("json", file))
        raise BadInput((f"{file} is not what ", measured, " writes"), fix="measure again") from error
    note = (
        f"coprune bench {found.model}: {found.dtype}, {found.threads} threads on {found.device}, {found.instruction_set} "
        "kernels. Forms in turns within one process; medians with quartiles."
    )
    return [section("Speed and memory when it runs", _sizes(found), _times(found), note=note)]


def _sizes(found: Bench) -> str:
    rows = []
    for form, size in found.bytes.items():
        limit = f"{found.bandwidth / size:.1f}" if found.bandwidth else "–"
        own = [form, f"{size / 1e6:,.1f}", f"{size / found.bytes[found.baseline(form)]:.3f}", limit]
        rows.append([*own, f"{found.files[form] / 1e6:,.1f}"] if found.files else own)
    header = ["form", "MB of weights in memory", f"of {found.reference}", "tokens/s that memory allows"]
    return table([*header, "MB on the disk"] if found.files else header, rows)


def _times(found: Bench) -> str:
    header = ["phase", "sequences", "form", "ms", "tokens/s", f"to {found.reference}"]
    return table(header, [_time(row, found.gains(row)) for row in found.rows])


def _time(row: Row, gains: bool) -> list[str]:
    t = row.seconds
    verdict = "" if gains else " (no gain here)"
    return [
        row.phase,
        str(row.batch),
        row.form,
        f"{t.median * 1e3:.2f} ({t.low * 1e3:.2f} – {t.high * 1e3:.2f})",
        f"{row.tokens_per_second:.1f}",
        f"{row.speedup:.2f} ×{verdict}",
    ]
