"""Wrong or malicious headers of safetensors files give one message each, before any data is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coprune.base.errors import BadInput
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.shards import read_entries, read_json, stored_entries
from support.pico_folder import save_pico

F32, I32 = "F32", "I32"


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(path: Path, header: str | bytes, data: int) -> Path:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


GOOD = entry(F32, [2, 2], 0, 16)
WRONG: dict[str, Any] = {
    "a negative size": {"a": entry(F32, [-2, -2], 0, 16)},
    "a size that is no number": {"a": entry(F32, ["2", 2], 0, 16)},
    "a size that is true": {"a": entry(F32, [True, 4], 0, 16)},
    "a size with a fraction": {"a": entry(F32, [2.0, 2], 0, 16)},
    "another size": {"a": entry(F32, [3, 2], 0, 16)},
    "a huge size": {"a": entry(F32, [2**62, 2**62], 0, 16)},
    "no list of sizes": {"a": entry(F32, 4, 0, 16)},
    "sizes by name": {"a": entry(F32, {"2": 2}, 0, 16)},
    "a dtype that is no text": {"a": entry(["F32"], [2, 2], 0, 16)},
    "a dtype of another size": {"a": entry("F64", [2, 2], 0, 16)},
    "places backwards": {"a": entry(F32, [2, 2], 16, 0)},
    "places below zero": {"a": entry(F32, [2, 2], -16, 0)},
    "places that are no numbers": {"a": entry(F32, [2, 2], "0", "16")},
    "three places": {"a": {"dtype": F32, "shape": [2, 2], "data_offsets": [0, 8, 16]}},
    "two tensors in one place": {"a": GOOD, "b": GOOD},
    "tensors that overlap": {"a": entry(F32, [2], 0, 8), "b": entry(F32, [3], 4, 16)},
    "a gap": {"a": entry(F32, [1], 0, 4), "b": entry(F32, [2], 8, 16)},
    "an entry that is no table": {"a": [F32, [2, 2], 0, 16]},
    "an entry without a place": {"a": {"dtype": F32, "shape": [2, 2]}},
    "a name that is no text": {"\ud800": GOOD},
    "no table": [GOOD],
    "a number": 7777,
}


@pytest.mark.parametrize("what", WRONG)
def test_an_unsound_header_is_one_message(what: str, tmp_path: Path) -> None:
    file = file_of(tmp_path / "model.safetensors", json.dumps(WRONG[what]), 16)
    with pytest.raises(BadInput, match="malformed") as caught:
        read_entries(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        f'{{"a": {json.dumps(GOOD)}, "a": {json.dumps(GOOD)}}}',
        '{"a": {"dtype": "F32", "dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, ' + "1" * 5000 + "]}}",
        b"\xff\xfe\xff\xfe",
    ],
    ids=["deep lists", "deep tables", "a tensor twice", "a key twice", "a long number", "no text"],
)
def test_text_that_breaks_a_parser_is_one_message(text: str | bytes, tmp_path: Path) -> None:
    file = file_of(tmp_path / "model.safetensors", text, 16)
    with pytest.raises(BadInput, match="malformed"):
        read_entries(file)


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    content = {"b": entry("BF16", [2, 3], 4, 16), "none": entry(F32, [0, 7], 4, 4), "a": entry("I8", [4], 0, 4)}
    entries = read_entries(file_of(tmp_path / "m.safetensors", json.dumps(content), 16))
    assert {name: found.shape for name, found in entries.items()} == {"a": (4,), "none": (0, 7), "b": (2, 3)}


def test_deeply_nested_or_huge_json_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(BadInput, match="nested too deep"):
        read_json(tmp_path / "config.json")
    monkeypatch.setattr("coprune.model.checkpoint.shards.MAX_JSON_BYTES", 1000)
    with pytest.raises(BadInput, match="too many for a settings file"):
        read_json(tmp_path / "config.json")


def test_integer_tensors_are_not_weights(tmp_path: Path) -> None:
    save_pico(tmp_path / "model", num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    file = stored_entries(tmp_path / "model")[name].file
    tensors = load_file(file)
    tensors[name] = torch.ones(tensors[name].shape, dtype=torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    location = ModelFolder(tmp_path / "model", "model")
    for load in (LazyCheckpoint, load_model):
        with pytest.raises(BadInput, match=f"{name} in I32"):
            load(location)
