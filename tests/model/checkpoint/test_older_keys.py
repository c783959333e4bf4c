"""Configuration keys for readers older than transformers 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from coprune.model.checkpoint.companions import save_companions
from coprune.model.checkpoint.load import quiet_transformers
from support.pico import FAMILIES, MIXTURES, pico_model

ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}


def _written(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    folder.mkdir()
    save_companions(pico_model(family, **changes), None, folder)
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_transformers_reads_the_same_configuration_with_older_keys_as_without(tmp_path: Path, family: str) -> None:
    _written(tmp_path / "both", family)
    with quiet_transformers():
        pico_model(family).config.save_pretrained(tmp_path / "newer")
        both, newer = (AutoConfig.from_pretrained(tmp_path / name) for name in ("both", "newer"))
        tried = (
            AutoModelForCausalLM.from_config(both).config.to_dict(),
            AutoModelForCausalLM.from_config(newer).config.to_dict(),
        )
    same = {name for name in tried[1] if name not in ("dtype", "architectures", "_name_or_path")}
    assert {name: tried[0][name] for name in same} == {name: tried[1][name] for name in same}


def test_the_rotary_base_is_stored_where_older_readers_look(tmp_path: Path) -> None:
    assert (
        _written(tmp_path / "a", "qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})["rope_theta"]
        == 1e6
    )
    scaled = _written(tmp_path / "b", "llama", rope_parameters=ROPE)
    assert scaled["rope_theta"] == 1e5
    assert "rope_scaling" not in scaled  # transformers warns about it
    assert {"rope_theta", "rope_local_base_freq"} <= _written(tmp_path / "c", "gemma3_text").keys()


def test_the_dtype_is_stored_under_both_names(tmp_path: Path) -> None:
    written = _written(tmp_path / "a", "llama")
    assert written["torch_dtype"] == written["dtype"] == "float32"
