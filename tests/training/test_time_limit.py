"""Minutes limit the whole fine-tuning: loading, measuring, training, saving and the verdict."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import coprune.training.finetuning
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter, Said
from coprune.recipe.views import training_recipe
from coprune.training.finetuning import run_finetuning
from coprune.training.time_limit import ENOUGH_STEPS, TimeLimit
from coprune.training.trainer import Pace
from coprune.training.training_data import TrainingData
from support.commands import run_command
from support.pruned import pruned_model, save, settings_for, write_text

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(pruned_model(num_hidden_layers=2), folder / "llama")
    write_text(folder / "text.txt", 700)
    write_text(folder / "test.txt", 300)
    return folder


@dataclass
class Heard:
    """A reporter that records its lines."""

    lines: list[str]
    reporter: Reporter


@pytest.fixture
def heard() -> Heard:
    lines: list[str] = []
    reporter = Reporter(quiet=True)
    reporter.listeners.append(lambda event: lines.append(event.text) if isinstance(event, Said) else None)
    return Heard(lines, reporter)


def asked(home: Path, folder: Path, **changes: Any) -> Any:
    measured = {"evaluate": True, "eval_data": str(home / "test.txt"), "max_steps": None, "mode": "lora"}
    return training_recipe(settings_for(folder, home / "llama", home / "text.txt", **measured | changes))


def data(windows: int = 100, held_out: int = 50, tokens: int = 16) -> TrainingData:
    own, watched = (TensorDataset(torch.zeros(count, tokens)) for count in (windows, held_out))
    return TrainingData(own, watched, "words", "f", tokens=tokens)


def spent(seconds: float, limit: float = 60, forward: float = 0.01, **more: Any) -> TimeLimit:
    """Return a partly spent time limit for a model with a given time per forward pass."""
    began = time.monotonic() - seconds
    return TimeLimit(limit, began, loading=1.0, repeated=5.0, measuring=forward, training=forward, **more)


def test_work_before_and_after_the_training_is_subtracted_from_its_time(
    home: Path, tmp_path: Path, heard: Heard
) -> None:
    _, seconds = spent(20).planned(data(), asked(home, tmp_path, minutes=1), False, heard.reporter)
    assert seconds is not None
    assert 60 - 20 - 15 < seconds < 60 - 20 - 5 - 1


@pytest.mark.slow
def test_a_training_ends_within_its_minutes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = coprune.training.finetuning._measure

    def slowly(*arguments: Any) -> Any:
        time.sleep(3)
        return measure(*arguments)

    monkeypatch.setattr(coprune.training.finetuning, "_measure", slowly)
    started = time.monotonic()
    report = run_finetuning(asked(home, tmp_path / "run", minutes=0.4, gate=True), Reporter(quiet=True))
    assert report.steps >= ENOUGH_STEPS
    assert time.monotonic() - started < 1.2 * 24


def test_minutes_too_short_for_a_step_are_refused_with_the_minimum(home: Path, tmp_path: Path, heard: Heard) -> None:
    with pytest.raises(BadInput, match="not one step fits") as refused:
        run_finetuning(asked(home, tmp_path / "run", minutes=0.001), heard.reporter)
    assert refused.value.field == "minutes"
    assert "minutes=0." in str(refused.value)
    assert not (tmp_path / "run" / "model").exists()


def test_a_model_that_loads_too_slowly_is_refused_as_soon_as_it_is_loaded(home: Path, tmp_path: Path) -> None:
    limit = TimeLimit(60, time.monotonic() - 20)
    limit.loaded(2, asked(home, tmp_path, minutes=1))
    with pytest.raises(BadInput, match=r"the rest takes about 80 s here; it takes at least"):
        limit.loaded(20, asked(home, tmp_path, minutes=1))


def test_a_slow_measurement_is_refused_within_the_minutes(
    home: Path, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a suddenly busy machine the measurement takes far longer than in the trial."""
    measure, waited = coprune.training.finetuning._measure, [0]

    def slowly(session: Any, which: str) -> Any:
        with session.reporter.bar("as slow as can be", 100) as advance:
            for _ in range(100):
                time.sleep(0.1)
                waited[0] += 1
                advance(1)
        return measure(session, which)

    monkeypatch.setattr(coprune.training.finetuning, "_measure", slowly)
    began = time.monotonic() - 55
    with pytest.raises(BadInput, match="not one step fits"):
        run_finetuning(asked(home, tmp_path / "run", minutes=1), heard.reporter, began=began)
    assert time.monotonic() - began < 1.2 * 60
    assert 0 < waited[0] < 100


def test_a_just_pruned_model_is_trained_for_at_least_one_step(home: Path, tmp_path: Path, heard: Heard) -> None:
    report = run_finetuning(asked(home, tmp_path / "run", minutes=0.001), heard.reporter, after_pruning=True)
    assert report.steps == 1
    assert any("and one is taken" in line for line in heard.lines)


def test_too_few_steps_are_reported_before_the_training(home: Path, tmp_path: Path, heard: Heard) -> None:
    recipe = asked(home, tmp_path, minutes=1, accumulate=8)
    spent(20, forward=0.3).planned(data(), recipe, False, heard.reporter)
    assert "fewer than 20 change little" in heard.lines[-1]
    assert "minutes=" in heard.lines[-1]


def test_steps_have_fewer_windows_if_time_is_short(home: Path, tmp_path: Path, heard: Heard) -> None:
    recipe = asked(home, tmp_path, minutes=1, accumulate=None, batch_size=None)
    planned = [spent(20, forward=seconds).planned(data(), recipe, False, heard.reporter)[0] for seconds in (0.01, 0.2)]
    assert planned[0].accumulate == data().accumulate
    assert 1 <= planned[1].accumulate < data().accumulate
    assert not any("change little" in line for line in heard.lines)


def test_held_out_loss_takes_a_small_part_of_the_time(home: Path, tmp_path: Path, heard: Heard) -> None:
    recipe = asked(home, tmp_path, minutes=1, batch_size=1)
    watched = [spent(20, forward=seconds).planned(data(), recipe, False, heard.reporter)[0] for seconds in (1e-4, 0.1)]
    counts = [0 if one.held_out is None else len(one.held_out) for one in watched]
    assert counts[0] == 50
    assert 0 < counts[1] <= 4


@pytest.mark.parametrize(
    ("more", "changes", "measured"),
    [
        ({}, {}, lambda tokens: 16 <= tokens <= 6 * 16),
        ({}, {"eval_tokens": 160}, lambda tokens: tokens == 160),
        ({"after_pruning": True}, {}, lambda tokens: tokens is None),
    ],
)
def test_by_default_measuring_takes_a_share_of_the_time(
    home: Path, tmp_path: Path, heard: Heard, more: Any, changes: Any, measured: Any
) -> None:
    from coprune.evaluation.tasks import task_for
    from coprune.model.loaded_model import open_model

    recipe = asked(home, tmp_path, minutes=1, batch_size=1, **changes).replaced(seqlen=16)
    task = task_for(recipe, open_model(recipe.model, stream=False))
    found = spent(0, forward=1.0, **more).bounded(recipe, task, data(), heard.reporter)
    assert measured(found.evaluate.tokens)


def test_a_step_that_no_longer_fits_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 30.0, 60.0, 90.0])
    monkeypatch.setattr("coprune.training.trainer.time.perf_counter", lambda: next(now))
    pace = Pace(100)  # starts the clock
    ended = []
    for step in (1, 2, 3):
        pace.update(step, 10**9)
        ended.append(pace.done == 1)
    assert ended == [False, False, True]


def test_the_last_lines_are_a_verdict_and_the_next_command(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", home / "llama", "--dataset", home / "text.txt", "--seqlen", 16, "--max-steps", 2]
    words += ["--eval-data", home / "test.txt", "--save", tmp_path / "run", "--quiet"]
    ended = run_command([str(word) for word in words], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    *_, verdict, following = ended.out.splitlines()
    assert verdict.startswith("verdict   perplexity ")
    assert "it writes" in verdict
    assert following.startswith("next      ")
    assert "coprune " in following or "--minutes" in following


def test_answers_not_requested_stop_at_their_share_of_the_time(
    home: Path, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coprune.training.time_limit._ANSWERING", 1e-6)
    recipe = asked(home, tmp_path / "run", minutes=0.3, gate=True, max_steps=2)
    report = run_finetuning(recipe, heard.reporter)
    assert report.answers is None
    assert report.no_answers is not None
    assert "a tenth of the time" in report.no_answers
    assert report.steps >= 1
