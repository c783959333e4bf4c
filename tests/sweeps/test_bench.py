"""Bench: its figures are consistent, and unmeasurable models are refused. No times are asserted."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coprune.base.errors import BadInput
from coprune.sweeps.generation_speed import bench
from support.pico import pico_model
from support.pico_folder import save_pico
from support.pico_gguf import write_pico_gguf

SHORT: Any = {"prompt": 8, "tokens": 3, "repeats": 2}


def test_folders_and_gguf_files_are_measured_in_turns(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    for name, width in (("large", 96), ("small", 32)):
        made = pico_model("llama", intermediate_size=width)
        made.save_pretrained(tmp_path / name)
        write_pico_gguf(made, tmp_path / f"{name}.gguf", "Q8_0")
    models = [tmp_path / name for name in ("large", "small", "large.gguf", "small.gguf")]
    found = bench(models, **SHORT)
    assert [row.model for row in found.rows] == ["large", "small", "large.gguf", "small.gguf"]
    assert [row.runtime for row in found.rows] == ["transformers float32"] * 2 + ["llama.cpp q8_0"] * 2
    for row, model in zip(found.rows, models, strict=True):
        assert row.file_bytes == (model if model.is_file() else model / "model.safetensors").stat().st_size
        for speed in (row.prefill, row.decode):
            assert 0 < speed.low <= speed.median <= speed.high
    for large, small in (found.rows[:2], found.rows[2:]):
        assert small.memory_bytes < large.memory_bytes
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["model"] == "large"
    assert "1.00×" in str(found)


def test_tokens_per_second_follow_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this clock every call takes a second: eight prompt tokens, then one token at a time."""
    ticks = iter(range(1000))
    monkeypatch.setattr("coprune.sweeps.generation_speed.time.perf_counter", lambda: float(next(ticks)))
    (row,) = bench(save_pico(tmp_path / "model", num_hidden_layers=1), **SHORT).rows
    assert (row.prefill.median, row.decode.median) == (8.0, 1.0)


def test_a_busy_machine_is_measured_by_cpu_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, own = save_pico(tmp_path / "model", num_hidden_layers=1), list[float](), time.process_time

    def noted() -> float:
        asked.append(own())
        return asked[-1]

    monkeypatch.setattr("coprune.sweeps.generation_speed.time.process_time", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    bench(model, **SHORT, busy=True)
    assert len(asked) == 2 * (2 + 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(BadInput, match="one thread"):
        bench(model, busy=True)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    model = save_pico(tmp_path / "model", num_hidden_layers=1)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tokens": 0}, "whole numbers of at least 1"),
        ({"prompt": 2.5}, "whole numbers of at least 1"),
        ({"dtype": "float17"}, "unknown dtype 'float17'; did you mean 'float16'"),
        ({"prompt": 100_000}, "and the model has"),
    ]
    for settings, message in wrong:
        with pytest.raises(BadInput, match=message):
            bench(model, **{**SHORT, **settings})
    with pytest.raises(BadInput, match="no model is named"):
        bench([])


@pytest.mark.parametrize("damage", ["missing", "cut off", "incomplete", "of another kind"])
def test_a_folder_without_a_complete_language_model_is_refused(damage: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "pico")
    file, *_ = sorted(folder.glob("*.safetensors"))
    config, index = folder / "config.json", folder / "model.safetensors.index.json"
    if damage == "missing":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "incomplete":
        tensors, said = load_file(file), json.loads(index.read_text())
        del said["weight_map"][(name := min(tensors))], tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
        index.write_text(json.dumps(said))
    else:
        config.write_text(config.read_text().replace('"llama"', '"vit"'))
    with pytest.raises(BadInput, match=r"missing|cut off|lacks|cannot be loaded"):
        bench(folder, **SHORT)
