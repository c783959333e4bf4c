"""A registered step in a sweep: its lists multiply, shared first steps are done once, and finished results are reused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.report.schema import Report
from coprune.run.step import source_named
from coprune.runner.runner import make
from coprune.sweeps.expand import Run, expand
from coprune.sweeps.file import SHARED_FOLDER, Sweep
from coprune.sweeps.sweep_call import sweep
from coprune.sweeps.sweep_result import SweepResult
from support.merge_step import Merge, MergeSettings, tensors_of
from support.pico_folder import save_pico
from support.pico_sweep import alone, make_place, measured, sweep_data

MERGES: dict[str, Any] = {"merge": {"other": "other", "share": [0.25, 0.75]}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_place(tmp_path))
    save_pico(tmp_path / "other", seed=1)
    return tmp_path


def data(*steps: dict[str, Any], **changes: Any) -> dict[str, Any]:
    zeros = {"method": "magnitude", "sparsity": [0.25, 0.5]}
    return sweep_data(**zeros | changes, sweep={"steps": steps or MERGES})


def do(*steps: dict[str, Any], **changes: Any) -> SweepResult:
    return sweep(data(*steps, **changes), workers=2, threads=1, quiet=True)


def written(folder: Path) -> dict[str, int]:
    """Return the models and reports in a folder with their times."""
    found = [*folder.rglob("*.safetensors"), *folder.rglob("report.json"), *folder.rglob("merged.json")]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in found}


def test_lists_of_its_settings_multiply_and_nothing_is_done_twice(place: Path) -> None:
    found = do()
    shares, zeros = (0.25, 0.75), (0.25, 0.5)
    assert [*found.reports] == [f"merge_share-{share}/sparsity-{zero}" for share in shares for zero in zeros]
    merged = sorted(place.glob(f"out/{SHARED_FOLDER}/steps/*/model"))
    assert len(merged) == 2
    assert {run.recipe.model.name for run in found.runs} == {str(one.relative_to(place)) for one in merged}
    rows = list(csv.DictReader((place / "out/results.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["model"], row["merge_share"], row["sparsity"]) for row in rows] == [
        ("model", str(share), str(zero)) for share in shares for zero in zeros
    ]
    # The same as by hand.
    run = found.runs[-1]
    by_hand = Merge.of(MergeSettings(other=place / "other", share=0.75), place / "by-hand")
    made = make([by_hand], source_named("model"), Reporter(quiet=True)).model
    again = Run(run.name, run.recipe.replaced(model=str(made)))
    assert measured(alone(again, place / "separate")) == measured(Report.read(run.recipe.run_folder / "report.json"))
    # Repeating the call does nothing; a longer list only adds runs.
    before = written(place / "out")
    assert len(do().reports) == 4
    assert written(place / "out") == before
    longer = {"merge": {"other": "other", "share": [0.25, 0.75, 0.5]}}
    assert len(do(longer).reports) == 6
    after = written(place / "out")
    assert {name: after[name] for name in before} == before
    assert len([name for name in after if name.endswith("merged.json")]) == 3
    # Results from other bytes are not reused.
    save_pico(place / "other", seed=5)
    with pytest.raises(BadInput, match="holds a report for other weights: model has changed since"):
        do()


def test_several_steps_run_in_order(place: Path) -> None:
    save_pico(place / "third", seed=2)
    two = {"merge": {"other": "other"}}, {"merge": {"other": "third", "share": [0.25, 0.75]}}
    first, second = expand(Sweep.make(data(*two, sparsity=0.5)))
    assert (first.name, second.name) == ("merge2_share-0.25", "merge2_share-0.75")
    assert first.steps[0] == second.steps[0]
    assert first.steps[1] != second.steps[1]
    assert first.steps[1].folder != second.steps[1].folder
    left = make(first.steps, source_named("model"), Reporter(quiet=True))
    assert str(left.model) == first.recipe.model.name
    model, other, third, made = map(
        tensors_of, (place / "model", place / "other", place / "third", first.steps[1].model)
    )
    name = min(made)
    assert torch.allclose(0.25 * (model[name] + other[name]) / 2 + 0.75 * third[name], made[name], atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ({"merg": {}}, "unknown step 'merg'"),
        ({"merge": {"others": "other"}}, "unknown setting 'others'"),
        ({"merge": {"other": "other", "share": [0.5, 2]}}, "share"),
        ("merge", "steps"),
    ],
)
def test_unknown_steps_and_settings_are_refused_before_any_work(steps: Any, said: str, place: Path) -> None:
    with pytest.raises(BadInput, match=said):
        expand(Sweep.make(sweep_data(sweep={"steps": steps})))
