"""A custom step is one class: the runner executes it, resumes it after a kill, and reuses its result."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.model.checkpoint.writer import CheckpointWriter
from coprune.run.step import Left
from coprune.runner.runner import execute
from support.killing import count_lines, killed_at
from support.merge_step import Merge, tensors_of
from support.pico_folder import save_pico

QUIET = Reporter(quiet=True)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    small: dict[str, Any] = {"num_hidden_layers": 1}
    return save_pico(tmp_path / "one", **small), save_pico(tmp_path / "other", seed=1, **small)


def weights(left: Left) -> bytes:
    assert left.model is not None
    return (left.model / "model.safetensors").read_bytes()


def merge(models: tuple[Path, Path], folder: Path, share: float = 0.5, replaces: bool = False) -> Left:
    records, left = execute([Merge(models=models, folder=folder, settings={"share": share})], QUIET, replaces=replaces)
    assert records == [left.record]
    return left


def test_a_finished_custom_step_is_not_repeated(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = merge(models, tmp_path / "merged")
    one, other, mean = map(tensors_of, (*models, tmp_path / "merged" / "model"))
    assert mean.keys() == one.keys()
    assert all(((one[name] + other[name]) / 2 - mean[name]).abs().max() < 1e-6 for name in mean)
    monkeypatch.setattr(CheckpointWriter, "__init__", lambda *_: pytest.fail("it is finished"))
    assert weights(merge(models, tmp_path / "merged")) == weights(left)


def test_a_custom_step_killed_at_any_moment_ends_with_the_same_bytes(models: tuple[Path, Path], tmp_path: Path) -> None:
    work = partial(merge, models, tmp_path / "merged")
    lines, _ = count_lines(work, ("",))
    expected = (tmp_path / "merged" / "model" / "model.safetensors").read_bytes()
    for share in (0.2, 0.4, 0.6, 0.8, 0.95):
        shutil.rmtree(tmp_path / "merged")
        killed_at(work, int(lines * share))
        assert weights(work()) == expected


def test_a_custom_step_runs_again_when_a_source_changes(models: tuple[Path, Path], tmp_path: Path) -> None:
    before = weights(merge(models, tmp_path / "merged"))
    save_pico(models[1], seed=2, num_hidden_layers=1)
    after = weights(merge(models, tmp_path / "merged"))
    assert before != after == weights(merge(models, tmp_path / "fresh"))


def test_other_settings_give_another_result_and_replace_nothing_unasked(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    before = weights(merge(models, tmp_path / "merged"))
    with pytest.raises(BadInput, match=r"holds the work of another run, in which share was 0\.5 and is 0\.25"):
        merge(models, tmp_path / "merged", share=0.25)
    assert weights(merge(models, tmp_path / "merged")) == before
    assert weights(merge(models, tmp_path / "merged", share=0.25, replaces=True)) != before


def test_custom_steps_chain_and_run_again_when_a_source_changes(models: tuple[Path, Path], tmp_path: Path) -> None:
    """The second reads the first one's result, and both are repeated if a source of the first changes."""
    how: dict[str, Any] = {"settings": {"share": 0.5}}
    first = Merge(models=models, folder=tmp_path / "first", **how)
    second = Merge(models=models[1:], folder=tmp_path / "second", **how)
    plan = [first, second]
    before = weights(execute(plan, QUIET)[1])
    save_pico(models[0], seed=3, num_hidden_layers=1)
    assert weights(execute(plan, QUIET)[1]) != before
