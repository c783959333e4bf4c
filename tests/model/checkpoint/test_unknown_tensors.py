"""A file with far more tensors than its model knows is reported in a few lines."""

from __future__ import annotations

import json
from pathlib import Path

from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.locate import ModelFolder, locate
from coprune.model.loaded_model import Loaded
from coprune.report.run_events import left_lines
from support.pico_folder import save_pico

MANY = 20_000


def test_many_unknown_tensors_are_reported_in_a_few_lines(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model", num_hidden_layers=1)
    names = [f"model.layers.{number}.extra.weight" for number in range(MANY)]
    names += [f"{letter}{number}" for number in range(1000) for letter in "ab"]
    entries = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    header = json.dumps(entries).encode()
    (folder / "more.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(names, "more.safetensors")
    index.write_text(json.dumps(content))
    location = locate(folder)
    assert isinstance(location, ModelFolder)
    checkpoint = LazyCheckpoint(location)
    assert len(checkpoint.carried_entries) == MANY + 2000
    told = left_lines(Loaded(checkpoint, None, "model", False).left_out)
    assert len(told) == 31
    assert f"model.layers.*.extra.weight ({MANY:,}), which the model does not load" in told
    assert told[-1] == "1,971 more kinds of such tensors"
