"""Resuming a training that was stopped late or failed early."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.data import corpora
from coprune.data.text import JoinedText
from coprune.recipe.views import training_recipe
from coprune.training.finetune_report import FinetuneReport
from coprune.training.finetuning import run_finetuning
from support.pruned import StoppedAt, pruned_model, save, settings_for, write_text

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(pruned_model(num_hidden_layers=2), folder / "llama")
    write_text(folder / "text.txt", 700)
    return folder


def run(home: Path, folder: Path, reporter: Reporter = QUIET, **changes: Any) -> FinetuneReport:
    settings = settings_for(folder, home / "llama", home / "text.txt", mode="dense", **changes)
    return run_finetuning(training_recipe(settings), reporter)


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "training").glob("checkpoint-*"))


def test_a_training_killed_after_its_last_step_takes_no_more_steps(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    # 13 steps end within a pass over the text, and with a constant rate an extra step would change weights.
    monkeypatch.setattr("coprune.training.trainer.rate_at", lambda done: 1.0)
    how: dict[str, Any] = {"max_steps": 13, "held_out": 0.1}
    whole = run(home, tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        patch.setattr("coprune.training.finetuning._finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(home, tmp_path / "cut", **how)
    resumed = run(home, tmp_path / "cut", **how)
    assert (resumed.steps, len(resumed.held_out)) == (whole.steps, len(whole.held_out)) == (13, 5)
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_states_are_saved_by_time_if_steps_are_slow(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coprune.training.trainer._SECONDS_BETWEEN_STATES", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path, StoppedAt(0.5), max_steps=6)
    assert states(tmp_path) == ["checkpoint-2"]


def test_a_training_that_failed_before_its_first_state_is_replaced(home: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path, StoppedAt(0.3), max_steps=6)
    assert (tmp_path / "training" / "place.json").is_file()
    assert run(home, tmp_path, max_steps=2, learning_rate=1e-3).steps == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "distill", "teacher": "nowhere/at-all"}, "nowhere/at-all"),
        (
            {"report_to": "tensorbord"},
            "the tracker tensorbord is not installed; pip install tensorbord",
        ),
        ({"save_model": "training/model"}, "would be inside the run's internal folders"),
        ({"save_model": ".."}, "which will be the model's"),
    ],
)
def test_impossible_trainings_are_refused_before_measuring(
    home: Path, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    run_folder = tmp_path / "runs" / "one"
    settings = settings_for(
        run_folder, home / "llama", home / "text.txt", evaluate=True, eval_data=str(home / "text.txt")
    )
    settings |= wrong
    if "save_model" in wrong:
        settings["save_model"] = (run_folder / wrong["save_model"]).resolve()
    said: list[str] = []
    reporter = Reporter(quiet=True)
    reporter.say = lambda line: said.append(line)  # type: ignore[method-assign]
    with pytest.raises(BadInput, match=re.escape(message)):
        run_finetuning(training_recipe(settings), reporter)
    assert not any("pruned model" in line for line in said)
    assert not run_folder.exists()


def test_tensorboard_logs_outlive_the_training_states(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(home, tmp_path, report_to="tensorboard", max_steps=3)
    assert not (tmp_path / "training").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Scalars("train/loss")) == 3


def test_without_a_text_a_training_needs_no_network(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = JoinedText((home / "text.txt").read_text(), "the embedded text")
    monkeypatch.setitem(corpora.EMBEDDED, "embedded", lambda: text)
    settings = settings_for(tmp_path / "run", home / "llama", home / "text.txt", mode="dense", max_steps=2)
    del settings["dataset"]
    report = run_finetuning(training_recipe(settings), QUIET)
    assert report.source == "the embedded text"
    assert report.settings.calibrate.data == "embedded"
