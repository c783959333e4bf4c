"""Write the results of a sweep: a row per run in `results.parquet` and `results.csv`, tables in `results.md`, and a page."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from coprune.base.files import write_durably, write_text
from coprune.base.words import printable
from coprune.evaluation.zero_shot import Estimate, main_of
from coprune.recipe.command import command_of
from coprune.recipe.flat import PRESET
from coprune.report.schema import Report
from coprune.sweeps.expand import Run, varied
from coprune.sweeps.file import Sweep
from coprune.sweeps.finished import Ledger, sweep_command
from coprune.sweeps.paper_tables import SPREAD, paper_tables, perplexity_of, tasks_of, top1_of
from coprune.sweeps.sweep_page import write_sweep_page

PARQUET, CSV, MARKDOWN, FAILURES = "results.parquet", "results.csv", "results.md", "failures.txt"
Row = dict[str, Any]


def collect(
    sweep: Sweep, runs: Sequence[Run], reports: Mapping[str, Report], failures: Mapping[str, str], ledger: Ledger
) -> None:
    """Write all results of a sweep to its folder, replacing earlier files."""
    folder = sweep.folder
    rows = [_row(run, reports.get(run.name), failures.get(run.name), varied(sweep)) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    _write_parquet(folder / PARQUET, rows, columns)
    write_text(folder / CSV, _csv(rows, columns))
    write_text(folder / MARKDOWN, results_markdown(sweep, runs, reports, failures, ledger))
    told = [f"{name}\n\n{text}\n" for name, text in failures.items()]
    if told:
        write_text(folder / FAILURES, "\n".join(told))
    else:
        (folder / FAILURES).unlink(missing_ok=True)
    if reports:
        write_sweep_page(folder)


def print_tables(sweep: Sweep, runs: Sequence[Run], reports: Mapping[str, Report], console: Console) -> None:
    """Print the tables with the best value of every column in bold."""
    for one in paper_tables(sweep, runs, reports):
        console.print(Text(printable(one.title)), soft_wrap=True)  # no markup and no control characters
        console.print(one.sheet().terminal())


def results_markdown(
    sweep: Sweep, runs: Sequence[Run], reports: Mapping[str, Report], failures: Mapping[str, str], ledger: Ledger
) -> str:
    """Return the tables, the failed runs, and the time of the sweep as Markdown."""
    parts = [table.markdown() for table in paper_tables(sweep, runs, reports)]
    seeds = {run.recipe.calibrate.seed for run in runs}
    if len(seeds) > 1:
        parts.append(f"Seeds {', '.join(map(str, sorted(seeds)))}.\n")
    if any("±" in part for part in parts):
        parts.append(f"{SPREAD}\n")
    parts.append(f"{len(reports)} of {len(runs)} runs are done. {ledger.line()}".rstrip() + "\n")
    parts += [f"- failed: {name}: {text.splitlines()[-1]}\n" for name, text in failures.items() if text]
    parts.append(f"Resume with `{sweep_command(sweep.folder)}`.\n")
    return "\n".join(parts)


def _row(run: Run, report: Report | None, failure: str | None, fields: Sequence[str]) -> Row:
    recipe = run.recipe
    state = "done" if report is not None else "failed" if failure is not None else "not done"
    row: Row = {"run": run.name, "state": state, "model": run.model, "method": recipe.prune.method.name}
    row |= {"pattern": recipe.prune.pattern, "ratio": recipe.prune.ratio, "seed": recipe.calibrate.seed}
    others = [name for name in ("dataset", "nsamples", "seqlen", *fields) if name != PRESET]
    row |= ({PRESET: run.preset} if PRESET in fields else {}) | {name: _plain(run.setting(name)) for name in others}
    if report is not None:
        row |= _measured(report)
    error = None if failure is None else failure.splitlines()[-1] if failure else ""
    return row | {"error": error, "folder": str(recipe.run_folder), "command": command_of(recipe)}


def _measured(report: Report) -> Row:
    row: Row = {"zeros": report.sparsity.matrices, "zeros_of_all": report.sparsity.model}
    for text in report.perplexity:
        row |= {f"perplexity {text.data}": perplexity_of(report, text), f"dense perplexity {text.data}": text.dense}
    for images in report.accuracy:
        row |= {f"accuracy {images.data}": top1_of(report, images), f"dense accuracy {images.data}": images.dense_top1}
    if (tasks := tasks_of(report)) is not None:
        row |= _columns("mean accuracy", tasks.mean_pruned, tasks.mean_dense)
        for task in tasks.tasks:
            metric, dense = main_of(task.pruned), task.dense or {}
            row |= _columns(f"{metric} {task.task}", task.pruned[metric], dense.get(metric))
    errors = [matrix.relative_layer_error for matrix in report.matrices if matrix.relative_layer_error is not None]
    row["mean layer error"] = math.fsum(errors) / len(errors) if errors else None
    return row | {
        "prune_seconds": report.prune_seconds,
        "total_seconds": report.total_seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "numerical_events": len(report.events),
    }


def _columns(name: str, found: Estimate | None, dense: Estimate | None) -> Row:
    """Return columns with an estimate of the final and of the dense model, each with its standard error."""
    row: Row = {}
    for title, one in ((name, found), (f"dense {name}", dense)):
        row |= {title: None if one is None else one.value, f"{title} ±": None if one is None else one.stderr}
    return row


def _plain(value: Any) -> Any:
    """Convert a setting to a single value for a table."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return " ".join(f"{name}={one}" for name, one in value.items())
    return " ".join(map(str, value)) if isinstance(value, tuple) else os.fspath(value)


def _write_parquet(file: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    write_durably(file, lambda temporary: pq.write_table(table, temporary))


def _csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if row.get(name) is None else row[name] for name in columns} for row in rows)
    return stream.getvalue()
