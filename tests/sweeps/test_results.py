"""A sweep's tables in the papers' layout, rows for other programs, its page, and `report` and `compare` on it."""

from __future__ import annotations

import csv
import statistics
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from coprune.base.errors import BadInput, CopruneError
from coprune.base.pool import do_job
from coprune.base.progress import Reporter
from coprune.commands.sweep import _show
from coprune.commands.terminal import console
from coprune.evaluation.answers.answer_facts import Requirement
from coprune.report.schema import Report
from coprune.runner.run_recipe import run_recipe
from coprune.sweeps import job, results
from coprune.sweeps.expand import Run
from coprune.sweeps.file import Sweep
from coprune.sweeps.finished import Ledger, finished_report, read_finished
from coprune.sweeps.job import RunJob
from coprune.sweeps.paper_tables import PaperTable, Result, paper_tables
from coprune.sweeps.results import _measured, collect
from coprune.sweeps.sweep_result import SweepResult
from support.commands import run_command
from support.pico_sweep import THREADS, make_place, pico_sweep
from support.reports import with_tasks

RULES = {"exclude": [{"method": "magnitude", "seed": 1}], "include": [{"method": "wanda", "seed": 0, "nsamples": 8}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sweep finished except for one run."""
    folder = make_place(tmp_path_factory.mktemp("place"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(job, "_texts", {})
        sweep, runs = pico_sweep(
            method=["wanda", "magnitude"],
            pattern=["unstructured", "2:4"],
            seed=[0, 1],
            save_model="models",
            sweep=RULES,
        )
        Path("out").mkdir()
        Path("out/sweep.yaml").write_text(sweep.to_yaml(), encoding="utf-8")
        for run in runs:
            if run.name != "wanda/2-4/seed-1":
                do_job(RunJob(run, "run", sweep.folder, THREADS))
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Sweep, list[Run], dict[str, Report]]:
    monkeypatch.chdir(place)
    sweep, runs = pico_sweep(**yaml.safe_load(Path("out/sweep.yaml").read_text()))
    files = {run.name: Path("out", run.name, "report.json") for run in runs}
    return sweep, runs, {name: Report.read(file) for name, file in files.items() if file.is_file()}


def test_the_table_has_methods_down_patterns_across_and_spread_over_seeds(
    here: tuple[Sweep, list[Run], dict[str, Report]],
) -> None:
    sweep, runs, reports = here
    (table,) = paper_tables(sweep, runs, reports)
    assert table.title == "model: perplexity on test.txt, sequence length 32"
    assert table.columns == ["50 %", "2:4"]
    assert list(table.rows) == [
        "dense",
        "wanda, nsamples 4",
        "magnitude, nsamples 4",
        "wanda, nsamples 8",
    ]
    pruned = {name: report.perplexity[0].pruned for name, report in reports.items()}
    both = [pruned["wanda/unstructured/seed-0"], pruned["wanda/unstructured/seed-1"]]
    first, second = table.rows["wanda, nsamples 4"]
    assert first.text == f"{statistics.fmean(both):.2f} ± {statistics.stdev(both):.2f}"
    assert second.text == f"{pruned['wanda/2-4/seed-0']:.2f} (1 of 2)"
    assert table.rows["magnitude, nsamples 4"][0].text == f"{pruned['magnitude/unstructured/seed-0']:.2f}"
    methods = [cells for name, cells in table.rows.items() if name != "dense"]
    for column in (0, 1):
        best = min(cells[column].mean or inf for cells in methods)
        assert [cells[column].best for cells in methods] == [cells[column].mean == best for cells in methods]
    dense = next(iter(reports.values())).perplexity[0].dense
    assert f"| dense | {dense:.2f} | {dense:.2f} |" in table.markdown().splitlines()


def test_every_task_has_its_scores_with_standard_errors(here: tuple[Sweep, list[Run], dict[str, Report]]) -> None:
    sweep, runs, found = here
    (run,) = (run for run in runs if run.name == "magnitude/unstructured/seed-0")
    report = with_tasks(found[run.name])
    tables = {table.title.partition(": ")[2]: table for table in paper_tables(sweep, [run], {run.name: report})}
    task, mean = tables["accuracy on piqa"], tables["mean accuracy over the tasks"]
    assert [cell.text for (cell,) in task.rows.values()] == ["60.00 % ± 5.00 %", "50.00 % ± 5.00 %"]
    assert [cell.text for (cell,) in mean.rows.values()] == ["50.00 % ± 3.00 %", "50.00 % ± 3.00 %"]
    row = _measured(report)
    assert (row["acc piqa"], row["acc piqa ±"], row["dense acc piqa"]) == (0.5, 0.05, 0.6)
    assert (row["mean accuracy"], row["mean accuracy ±"]) == (0.5, 0.03)


def test_a_preset_is_shown_beside_its_method(here: tuple[Sweep, list[Run], dict[str, Report]], tmp_path: Path) -> None:
    sweep, runs, reports = here
    named = Sweep.make({**sweep.settings, "preset": ["fast"], "save": str(tmp_path)})
    runs = [replace(run, preset="fast" if run.recipe.prune.method.name == "wanda" else None) for run in runs]
    (table,) = paper_tables(named, runs, reports)
    assert list(table.rows) == ["dense", "fast (wanda)", "magnitude"]
    collect(named, runs, {}, {}, Ledger())
    with (tmp_path / "results.csv").open(newline="") as file:
        told = [(row["method"], row["preset"]) for row in csv.DictReader(file)]
    assert told == [(run.recipe.prune.method.name, run.preset or "") for run in runs]


def test_the_page_and_the_rows_show_the_finished_runs(
    here: tuple[Sweep, list[Run], dict[str, Report]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep, runs, reports = here
    collect(
        sweep, runs, reports, {"wanda/2-4/seed-1": "Traceback\nValueError: no"}, Ledger(wall=[3.0], runs={"a": 2.0})
    )
    text = Path("out/results.md").read_text(encoding="utf-8")
    assert "7 of 8 runs are done" in text
    assert "- failed: wanda/2-4/seed-1: ValueError: no" in text
    assert "wanda/unstructured/seed-0" in Path("out/report.html").read_text(encoding="utf-8")
    Path("out/report.html").unlink()
    assert run_command(["report", "out"], monkeypatch, capsys).code == 0
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "perplexity on test.txt, sequence length 32" in page
    assert "wanda, nsamples 8" in page


def test_compare_accepts_a_moved_sweep(
    here: tuple[Sweep, list[Run], dict[str, Report]],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended = run_command(
        ["compare", str(place / "out"), "--data", "test.txt", "--seqlen", "32", "--fresh", "--csv", "table.csv", "-q"],
        monkeypatch,
        capsys,
    )
    assert ended.code == 0, ended.err
    rows = Path("table.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 1 + 7
    assert rows[1].startswith("model,")


def test_names_in_tables_cannot_control_the_terminal(
    here: tuple[Sweep, list[Run], dict[str, Report]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = "[/bold]\x1b[2J"
    table = PaperTable(odd, [odd], {odd: [Result(odd, 1.0)]})
    monkeypatch.setattr(results, "paper_tables", lambda *_: [table])
    results.print_tables(*here, console())
    assert capsys.readouterr().out.count("[/bold]\\x1b[2J") == 4


def test_training_runs_finish_with_their_training_and_show_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_place(tmp_path))
    monkeypatch.setattr(job, "_texts", {})
    how = {"finetune": "dense", "finetune_tokens": 64, "finetune_lr": 1e-2, "gate": False, "sparsity": 0.5}
    sweep, (run,) = pico_sweep(method=["wanda"], eval_tokens=320, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coprune.training.finetuning.run_finetuning", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_and_train(run)
    assert finished_report(run.recipe) is None
    Path("out/sweep.yaml").write_text(sweep.to_yaml(), encoding="utf-8")
    with pytest.raises(BadInput, match="no run of the sweep in out is finished"):  # for its page, and for comparing
        read_finished(Path("out"))
    prune_and_train(run)
    assert list(read_finished(Path("out"))[2]) == ["wanda"]
    report = finished_report(run.recipe)
    assert report is not None
    assert report.finetuned is not None
    row = _measured(report)
    reached = report.finetuned.perplexity["test.txt"]
    assert row["perplexity test.txt"] == reached != report.perplexity[0].pruned
    (table,) = paper_tables(sweep, [run], {run.name: report})
    assert table.rows["wanda"][0].mean == reached
    result = SweepResult(sweep, [run], {run.name: report})
    assert f"perplexity {reached:.2f} on test.txt" in str(result.sheet().rows)
    with pytest.raises(BadInput, match="another run's report, in which seed was 0 and is 1"):
        finished_report(run.recipe.replaced(seed=1))


def test_a_sweep_exits_with_3_if_a_run_misses_its_requirements(
    here: tuple[Sweep, list[Run], dict[str, Report]], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, runs, reports = here
    held, broken = (Requirement(condition="loops<1", figure=n, dense=None, holds=not n) for n in (0.0, 2.0))
    first, second = list(reports)[:2]
    reports = {name: report.model_copy(update={"required": (held,)}) for name, report in reports.items()}
    _show(SweepResult(sweep, runs, reports))
    reports[second] = reports[second].model_copy(update={"required": (held, broken)})
    with pytest.raises(typer.Exit) as ended:
        _show(SweepResult(sweep, runs, reports))
    assert ended.value.exit_code == 3
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("required")]
    assert told == [f"required  {second}: loops<1 does not hold (2)"]
    with pytest.raises(CopruneError, match="1 of 8 runs failed"):
        _show(SweepResult(sweep, runs, reports, {first: "no room"}))


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def prune_and_train(run: Run) -> None:
    run_recipe(run.recipe, reporter=Reporter(quiet=True))
