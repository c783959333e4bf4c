"""Trackers and the JSON log: they get the report's figures, and nothing is written unless requested."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import coprune
from coprune.base.errors import BadInput
from coprune.pruning.pruner import MatrixResult
from coprune.run.trackers import final_figures
from support.pico_folder import save_pico, write_words


def prune(folder: Path, **settings: Any) -> Any:
    text = str(write_words(folder / "text.txt"))
    common: dict[str, Any] = {
        "dataset": text,
        "eval_data": text,
        "seqlen": 32,
        "nsamples": 4,
        "save": folder / "run",
        "quiet": True,
    }
    return coprune.prune(str(save_pico(folder / "model")), **common, **settings)


def test_json_lines_have_every_block_and_the_figures(tmp_path: Path) -> None:
    report = prune(tmp_path, log_json=tmp_path / "log.jsonl").report
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    events = [line["event"] for line in lines]
    assert events[0] == "started"
    assert events[-1] == "finished"
    assert events.count("phase") == len(report.phases)
    blocks = [line for line in lines if line["event"] == "block"]
    assert [line["block"] for line in blocks] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert [m["name"] for line in blocks for m in line["matrices"]] == [m.name for m in report.matrices]
    assert lines[-1]["figures"] == final_figures(report)
    assert all(a["time"] <= b["time"] for a, b in itertools.pairwise(lines))
    # The log's format, which other programs read.
    keys = {line["event"]: set(line) - {"time", "event"} for line in lines}
    assert keys == {
        "started": {"recipe"},
        "line": {"text"},
        "phase": {"name", "seconds", "resident_bytes", "device_bytes"},
        "block": {"block", "matrices"},
        "finished": {"figures"},
    }
    assert [line["name"] for line in lines if line["event"] == "phase"] == [phase.name for phase in report.phases]
    assert set(blocks[0]["matrices"][0]) == set(MatrixResult.model_fields) - {"distributions"}


def test_a_failed_run_is_logged(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        prune(tmp_path, log_json=tmp_path / "log.jsonl", include="nothing.like.it")
    last = json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["event"] == "failed"
    assert "nothing.like.it" in last["error"]


def test_the_log_of_a_failed_run_does_not_block_the_next(tmp_path: Path) -> None:
    log = tmp_path / "run" / "log.jsonl"
    with pytest.raises(BadInput):
        prune(tmp_path, log_json=log, include="nothing.like.it")
    common: dict[str, Any] = {
        "dataset": str(tmp_path / "text.txt"),
        "seqlen": 32,
        "nsamples": 4,
        "evaluate": False,
        "quiet": True,
    }
    coprune.prune(str(tmp_path / "model"), save=tmp_path / "run", log_json=log, **common)
    events = [json.loads(line)["event"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert (events.count("failed"), events[-1]) == (1, "finished")


def test_tensorboard_has_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = prune(tmp_path, report_to="tensorboard").report
    steps = [EventAccumulator(str(tmp_path / "run" / step / "tensorboard")).Reload() for step in ("prune", "train")]
    for name, value in final_figures(report).items():
        last = [one.Scalars(name)[-1].value for one in steps if name in one.Tags()["scalars"]]
        assert last[-1] == pytest.approx(value, rel=1e-6), name
    events = steps[0]
    errors = [event.value for event in events.Scalars("block/layer_error")]
    assert len(errors) == 3
    first = [m.relative_layer_error for m in report.matrices if m.name.startswith("model.layers.0.")]
    assert errors[0] == pytest.approx(sum(first) / len(first), rel=1e-5)


def test_unknown_or_missing_trackers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="did you mean 'tensorboard'"):
        prune(tmp_path, report_to="tensorbord")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    with pytest.raises(BadInput, match=r"pip install 'coprune\[wandb\]'"):
        prune(tmp_path, report_to="wandb")
    assert not (tmp_path / "run").exists()
