"""Results shared between runs change no bit."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coprune.base.pool import Cause, do_job
from coprune.model.checkpoint.load import load_model
from coprune.report.schema import Report
from coprune.run import context
from coprune.stages import run_stages
from coprune.sweeps import job
from coprune.sweeps.expand import Run
from coprune.sweeps.file import Sweep
from coprune.sweeps.job import RunJob
from coprune.training import footprint
from support.pico_sweep import THREADS, alone, make_place, measured, pico_sweep
from support.sample import sampled
from support.task_items import DEFINITIONS, word_items

TRAINED: dict[str, Any] = {
    "finetune": "dense",
    "finetune_tokens": 64,
    "finetune_lr": 1e-2,
    "gate": False,
    "sparsity": 0.5,
}
CUT: dict[str, Any] = {"remove": "channels=0.4", "align": 16, "gate": False, "sparsity": 0.5}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_place(tmp_path))
    monkeypatch.setattr(job, "_texts", {})
    return tmp_path


def do_here(sweep: Sweep, runs: Sequence[Run]) -> dict[str, Any]:
    """Execute runs in order in this process, like one worker; return their outcomes."""
    return {run.name: do_job(RunJob(run, "run", sweep.folder, THREADS)) for run in runs}


def counted_measurements(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the measurements of each model from now on."""
    times, measure = Counter[str](), run_stages.measure

    def counting(run: context.Run, which: str, name: str) -> Any:
        times[which] += 1
        return measure(run, which, name)

    monkeypatch.setattr(run_stages, "measure", counting)
    return times


@pytest.mark.parametrize("stream", sampled([True, False], quick=[True]))
def test_sharing_equals_not_sharing_bit_for_bit(stream: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, runs = pico_sweep(method=["wanda", "sparsegpt"], seed=[0, 1], stream=stream, save_model="models")
    times = counted_measurements(monkeypatch)
    ended = do_here(sweep, runs)
    assert {one.cause for one in ended.values()} == {None}, ended
    assert times == {"dense": 1, "pruned": 4}
    assert ended[runs[0].name].value["dense"] == 0
    assert all(ended[run.name].value["dense"] > 0 for run in runs[1:])
    for run in (runs[0], runs[-1]):
        separate = alone(run, place / "separate")
        assert measured(Report.read(run.recipe.run_folder / "report.json")) == measured(separate)
        for file in run.recipe.output.model.glob("*.safetensors"):
            assert separate.saved_model is not None
            assert file.read_bytes() == (separate.saved_model / file.name).read_bytes()


@pytest.mark.parametrize("halves", sampled([TRAINED, CUT], quick=[CUT]))
def test_runs_of_two_steps_share_measurements_of_the_source(
    halves: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, runs = pico_sweep(method=["wanda", "magnitude"], eval_tokens=320, **halves)
    times = counted_measurements(monkeypatch)
    ended = do_here(sweep, runs)
    assert {one.cause for one in ended.values()} == {None}, ended
    assert times["dense"] == 1
    assert ended["magnitude"].value["dense"] > 0
    shared, separate = Report.read(runs[1].recipe.run_folder / "report.json"), alone(runs[1], place / "separate")
    assert measured(shared) == measured(separate)
    if shared.finetuned is not None and separate.finetuned is not None:
        assert shared.finetuned.perplexity == separate.finetuned.perplexity


def test_every_run_logs_the_items_of_both_models(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("TASK_DATA", str(word_items(place / "data")))
    asked = {"tasks": "piqa", "limit": 3, "include_path": str(DEFINITIONS), "log_samples": "items", "evaluate": False}
    sweep, runs = pico_sweep(method=["wanda", "magnitude"], stream=False, **asked)
    ended = do_here(sweep, runs)
    assert {one.cause for one in ended.values()} == {None}, ended
    logged = {str(file.relative_to("items")) for file in Path("items").rglob("*.jsonl")}
    assert logged == {f"{run}/{model}/piqa.jsonl" for run in ("wanda", "magnitude") for model in ("dense", "pruned")}


def test_another_text_or_model_is_measured_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_place(place / "other")
    sweep, runs = pico_sweep(eval_data=["test.txt", "words.txt"], eval_tokens=320)
    assert {one.cause for one in do_here(sweep, runs).values()} == {None}
    first, second = (Report.read(run.recipe.run_folder / "report.json").perplexity[0] for run in runs)
    assert first.dense != second.dense
    text = (place / "test.txt").read_text()
    (place / "test.txt").write_text(" ".join(reversed(text.split())))
    monkeypatch.setattr(job, "_texts", {})  # as in a new process
    sweep, runs = pico_sweep(method="magnitude", eval_data=["test.txt"], save="out2", eval_tokens=320)
    sweep = sweep.with_settings({"save": "out"})
    do_here(sweep, runs)
    changed = Report.read(runs[0].recipe.run_folder / "report.json").perplexity[0]
    assert changed.dense not in (first.dense, second.dense)


def test_a_finished_run_is_not_repeated(place: Path) -> None:
    sweep, runs = pico_sweep(method=["magnitude"])
    do_here(sweep, runs)
    before = (place / "out/magnitude/report.json").stat().st_mtime_ns
    assert do_here(sweep, runs)["magnitude"].cause is None
    assert (place / "out/magnitude/report.json").stat().st_mtime_ns == before


def test_another_run_in_the_folder_is_refused(place: Path) -> None:
    sweep, runs = pico_sweep(method=["magnitude"])
    do_here(sweep, runs)
    sweep, runs = pico_sweep(method=["magnitude"], nsamples=5)
    event = do_here(sweep, runs)["magnitude"]
    assert event.cause is Cause.REFUSED
    assert "nsamples was 4 and is 5" in event.text


def test_a_training_that_cannot_fit_is_refused_before_pruning(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "room_on", lambda device, memory: (1000, "of memory"))
    sweep, (run,) = pico_sweep(method=["wanda"], evaluate=False, **TRAINED | {"check_memory": True})
    event = do_here(sweep, [run])["wanda"]
    assert event.cause is Cause.REFUSED
    assert "training all weights" in event.text
    assert not run.recipe.run_folder.exists()


def test_a_training_may_use_the_memory_of_the_pruned_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = list[weakref.ref[Any]]()

    def noted(*asked: Any) -> Any:
        found = load_model(*asked)
        loaded.append(weakref.ref(found[0]))
        return found

    def look(*_: Any, **__: Any) -> None:
        gc.collect()
        assert [model() for model in loaded] == [None]
        raise KeyboardInterrupt

    monkeypatch.setattr("coprune.model.loaded_model.load_model", noted)
    monkeypatch.setattr("coprune.training.finetuning.run_finetuning", look)
    sweep, runs = pico_sweep(method=["wanda"], evaluate=False, stream=False, **TRAINED)
    with pytest.raises(KeyboardInterrupt):
        do_here(sweep, runs)
